"""Outputs that one process alone may write."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graphprune.errors import EmitError
from graphprune.files.locks import lock, unlock
from graphprune.files.moves import identity
from graphprune.files.placing import NEW, OLD, Identity, finish, place
from graphprune.files.refusals import refused
from graphprune.files.signals import waiting


@dataclass(frozen=True)
class Claim:
    """An output that nobody else writes while the claim lasts.

    Attributes:
        path: its place, with all symbolic links followed.
        holder: the hidden directory beside it.
        overwrite: whether what is there may be replaced.
        before: what was there when the claim began.
    """

    path: Path
    holder: Path
    overwrite: bool
    before: Identity

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Prepare the output, and put it in place if the block ends well.

        Yields:
            A path that doesn't exist yet, for a file or a directory. A file may get companions
            beside it, which go with it.

        Raises:
            EmitError: the file system refused, or something else is in place by now.
        """
        with refused(self.path):
            (self.holder / NEW).mkdir()
            yield self.holder / NEW / self.path.name
            place(self.holder, self.path, self.before, overwrite=self.overwrite)


@contextmanager
def claimed(path: Path, *, overwrite: bool) -> Iterator[Claim]:
    """Claim an output for the time of the block; folders that it lies in are made.

    What a process that was killed has left there is put right first.

    Args:
        path: a file or a directory, or a symbolic link to where one is or will be.
        overwrite: whether what is there may be replaced.

    Raises:
        EmitError: another run has claimed it, or the file system refused.
    """
    path = Path(os.path.realpath(path))
    if not path.name:
        raise EmitError("the output is the root of the file system", hint="choose another output")
    with contextlib.ExitStack() as stack:
        with refused(path):
            stack.enter_context(_folders(path.parent))
            holder = stack.enter_context(_held(path))
            _put_right(holder, path)
        yield Claim(path, holder, overwrite, identity(path))


def recover(path: Path) -> None:
    """Put right what a process that was killed has left of an output, if there is anything.

    Where another run is at it, or the file system refuses, all stays as it is.
    """
    path = Path(os.path.realpath(path))
    if not _holder(path).is_dir():
        return
    with contextlib.suppress(EmitError, OSError), _held(path) as holder:
        _put_right(holder, path)


def _holder(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


@contextmanager
def _held(path: Path) -> Iterator[Path]:
    """The directory beside an output, locked; it is gone after the block."""
    with contextlib.ExitStack() as stack:
        # Nothing comes between what is done and the note that it has to be undone.
        with waiting():
            holder = _holder(path)
            descriptor = lock(holder, path)
            if descriptor is None:
                # Without locks nobody can tell whether an owner lives. Each has a directory of its
                # own, and what appears in place is noticed by the last moves.
                holder = Path(tempfile.mkdtemp(prefix=f"{holder.name}-", dir=path.parent))
            stack.callback(_release, holder, descriptor)
        yield holder


def _release(holder: Path, descriptor: int | None) -> None:
    with waiting():
        _clear(holder)
        unlock(holder, descriptor)


def _put_right(holder: Path, path: Path) -> None:
    finish(holder, path)
    _clear(holder)


def _clear(holder: Path) -> None:
    """Remove what is in a directory, and first what says that there is something to put right."""
    for name in (OLD, NEW):
        shutil.rmtree(holder / name, ignore_errors=True)


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Folders that are made, and removed again if nothing has come into them."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for made in missing:
                made.rmdir()
