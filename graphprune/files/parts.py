"""Second files of a model, which its first file refers to by name.

A part is called ``NAME.DIGEST.data`` for the model ``NAME``: by the first digits of the SHA-256 of
its content. So a new part never takes the place of an older model's, each model finds its own, and
the model is the only file that has to be replaced in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

_DIGITS = 12


def part_name(model: str, part: Path) -> str:
    """What the second file of a model is called.

    Args:
        model: the name of the model's file.
        part: the second file, complete.
    """
    return f"{model}.{_digest(part)}.data"


def is_part(name: str, model: str) -> bool:
    """Whether a file of this name is a part of a model, by the name of that."""
    return re.fullmatch(rf"{re.escape(model)}\.[0-9a-f]{{{_DIGITS}}}\.data", name) is not None


def is_whole(part: Path) -> bool:
    """Whether the content of a part is that which its name tells."""
    return part.is_file() and part.name.split(".")[-2] == _digest(part)


def drop_parts(model: Path, older: Path | None) -> None:
    """Remove the parts that no model refers to any more.

    A part of ours has the digest of its content in its name. What ``NAME.data`` is, as parts were
    called before, only the older model can tell.

    Args:
        model: the file in its place; it may be missing.
        older: the file that it has replaced, if it has.
    """
    parts = list(_candidates(model, older))
    beside = sorted(model.parent.glob(f"*{model.suffix}")) if parts else []
    for part in parts:
        if not any(_mentions(file, part.name) for file in beside):
            with contextlib.suppress(OSError):
                part.unlink()


def _candidates(model: Path, older: Path | None) -> Iterator[Path]:
    plain = model.with_name(f"{model.name}.data")
    if older is not None and plain.is_file() and _mentions(older, plain.name):
        yield plain
    for part in sorted(model.parent.iterdir()):
        if is_part(part.name, model.name) and not part.is_symlink() and is_whole(part):
            yield part


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:_DIGITS]


def _mentions(file: Path, name: str) -> bool:
    """Whether a file contains a name; one that can't be read may."""
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return data.find(name.encode()) >= 0
    except ValueError:  # it is empty
        return False
    except OSError:
        return not file.is_dir()
