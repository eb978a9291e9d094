"""Files for writers that can't be told that a disk is full."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes whatever comes; what the file system refused is raised at the end.

    torch writes the directory of an archive while it gives up on it, and where that fails too, it
    ends the process.

    Raises:
        OSError: the file can't be made, or not all of it could be written.
    """
    with path.open("wb") as file:
        stream = _Patient(file)
        yield stream
        if stream.error is not None:
            raise stream.error


class _Patient(io.BytesIO):
    """A stream into a file whose writes never fail."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def write(self, data: object) -> int:
        """All bytes are taken; after an error none is written."""
        with memoryview(data) as view:  # type: ignore[arg-type]
            size = view.nbytes
            if self.error is None:
                try:
                    self._file.write(view)
                except OSError as error:
                    self.error = error
        return size

    def flush(self) -> None:
        """Nothing waits here."""
