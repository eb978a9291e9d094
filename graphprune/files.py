"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphprune.errors import EmitError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place when the block ends without an error.

    Yields:
        A path that doesn't exist yet; the block may make it a file or a directory.

    Raises:
        EmitError: the file system refused (full disk, no permission).
    """
    path = Path(path)
    holder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary = holder / path.name
        yield temporary
        if path.is_dir() and not path.is_symlink():
            old = holder / f"{path.name}.old"  # goes with the holder, when the new one is there
            try:
                os.rename(path, old)
                os.replace(temporary, path)
            except BaseException:
                if old.exists() and not path.exists():
                    os.rename(old, path)
                raise
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise EmitError(
            "can't write the output",
            where=str(path),
            why=error.strerror or str(error),
            hint="free some disk space or choose another output path",
        ) from error
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
