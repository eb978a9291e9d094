"""Files that appear whole or not at all: prepared beside their place, then moved there.

    with replacing(path) as temporary:
        write(temporary)

Everything is prepared in ``.NAME.writing``, a hidden sibling of the output ``NAME`` that is
locked while its process lives. Two runs can't write one output, and what a process that was killed
has left behind is put right by the next run (`graphprune.files.claims`). The last moves replace an
older output in one step (`graphprune.files.placing`), and replace nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphprune.files.claims import Claim, claimed, recover


@contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path whose file or directory goes to `path` when the block ends well.

    Args:
        path: where to; through a symbolic link, to where that leads.
        overwrite: replace what is there.

    Yields:
        A path that doesn't exist yet; the block may make it a file or a directory.

    Raises:
        EmitError: the file system refused (full disk, no permission), another run writes the same
            output, or something is there that may not be replaced.
    """
    with claimed(path, overwrite=overwrite) as claim, claim.writing() as temporary:
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


__all__ = ["Claim", "claimed", "recover", "replacing", "write_text"]
