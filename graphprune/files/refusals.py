"""What a file system refuses, as one kind of error, whoever was told so."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from graphprune.errors import EmitError

_NUMBER = re.compile(r"\(os error (\d+)\)")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def refused(
    output: Path, what: str = "can't write the output", elsewhere: str = "choose another output"
) -> Iterator[None]:
    """Turn what the file system refuses within the block into one error.

    Args:
        output: where is written.
        what: the error's first line.
        elsewhere: how to have it written to another place.

    Raises:
        EmitError: it did.
    """
    try:
        yield
    except Exception as error:
        found = _refusal(error)
        if found is None:
            raise
        number, why = found
        raise EmitError(
            what,
            where=str(output),
            why=why,
            hint=f"free some disk space, or {elsewhere}" if number in _FULL else elsewhere,
        ) from error  # fmt: skip


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for files that are gone after the block; what is refused is one error there too.

    Raises:
        EmitError: the file system refused.
    """
    place = Path(tempfile.gettempdir())
    with (
        refused(place, "can't write a temporary file", "set TMPDIR to another directory"),
        tempfile.TemporaryDirectory(prefix="graphprune-") as folder,
    ):
        yield Path(folder)


def check_space(output: Path, size: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        output: a file or directory, which need not be there.
        size: bytes that it will take at least.

    Raises:
        EmitError: there are fewer.
    """
    folder = next(p for p in output.absolute().parents if p.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise EmitError(
            "there is too little space on the disk",
            where=str(output),
            why=f"the output takes {_shown(size)} at least, and {_shown(free)} are free",
            hint="free some disk space, or choose another output",
        )


def _refusal(error: Exception) -> tuple[int | None, str] | None:
    """The number of a file system's error, if it is known, and its text; None for other errors."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    if isinstance(error, SafetensorError) and (found := _NUMBER.search(str(error))):
        return int(found[1]), os.strerror(int(found[1]))
    return None


def _shown(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
