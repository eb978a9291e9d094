"""The last moves of an output, and what a process that was killed among them has left to do.

A directory takes one move: to a free name, or in exchange for the older directory.

A file with others takes several. First come the parts that it refers to, whose names are new (see
`parts`). Then older companions (plan, report) are set aside; the file itself is replaced, which
decides; its companions follow. Whenever the process dies, the model that is in place is whole, and
a companion beside it is its own. `finish` then completes what was decided, or undoes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from graphprune.errors import EmitError
from graphprune.files.moves import exchange, flush, identity, move_new, set_aside
from graphprune.files.parts import drop_parts, is_part, is_whole
from graphprune.files.signals import waiting

NEW, OLD = "new", "old"
"""Where an output is prepared, and where older files go; the second is there from the first of
several moves on."""

Identity = tuple[int, int] | None


def place(holder: Path, output: Path, before: Identity, *, overwrite: bool) -> None:
    """Move what was prepared to its place; signals to end wait until that is done.

    Args:
        holder: the directory that it was prepared in.
        output: its place.
        before: what was there when the work began, as `identity` tells.
        overwrite: replace that.

    Raises:
        EmitError: something else is there by now.
        OSError: the file system refused. The older output is in place then, and whole.
    """
    new = holder / NEW / output.name
    flush(holder / NEW)
    with waiting():
        if new.is_dir():
            _place_directory(holder, new, output, before if overwrite else None)
        else:
            _place_file(holder, new, output, before if overwrite else None)
    flush_folder(output.parent)


def finish(holder: Path, output: Path) -> None:
    """Complete the moves that a process that was killed had begun, or undo them.

    Nothing that has appeared meanwhile is replaced.

    Raises:
        OSError: the file system refused.
    """
    new, old = holder / NEW, holder / OLD
    if not (old.is_dir() and new.is_dir()):
        return
    main = new / output.name
    undecided = os.path.lexists(main) and not (output.exists() and output.samefile(main))
    for file in sorted((old if undecided else new).iterdir()):
        if file != main and not file.name.startswith(".") and not is_part(file.name, output.name):
            with contextlib.suppress(FileExistsError):
                move_new(file, output.with_name(file.name))
    older = old / output.name
    drop_parts(output, older if older.is_file() else None)


def flush_folder(folder: Path) -> None:
    """Have the names in a directory written to the disk, as far as the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _place_directory(holder: Path, new: Path, output: Path, before: Identity) -> None:
    try:
        move_new(new, output)
        return
    except FileExistsError:
        _check_same(output, before)
    if not output.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(output))
    if exchange(new, output):
        if identity(new) != before:
            exchange(new, output)
            raise _appeared(output)
        return
    # Between these two nothing is in place; `finish` puts it back.
    old = holder / OLD
    old.mkdir()
    os.rename(output, old / output.name)
    try:
        move_new(new, output)
    except BaseException:
        move_new(old / output.name, output)
        raise


def _place_file(holder: Path, new: Path, output: Path, before: Identity) -> None:
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))
    files = [f for f in sorted(new.parent.iterdir()) if f != new and not f.name.startswith(".")]
    parts = [f for f in files if is_part(f.name, output.name)]
    companions = [f for f in files if f not in parts]
    old = holder / OLD
    older = old / output.name
    undo: list[Callable[[], object]] = []
    old.mkdir()
    try:
        for part in parts:
            if not is_whole(output.with_name(part.name)):
                move_new(part, output.with_name(part.name))
                undo.append(output.with_name(part.name).unlink)
        there = before is not None and os.path.lexists(output)
        if there:
            _check_same(output, before)
            set_aside(output, older)
        for file in companions if before is not None else ():
            known = output.with_name(file.name)
            if known.is_file():
                os.rename(known, old / file.name)
                undo.append(partial(move_new, old / file.name, known))
        if there:
            os.replace(new, output)
            if older.exists():
                undo.append(partial(os.replace, older, output))
            else:
                undo.clear()  # nothing can bring the older file back, and nothing of it may return
        else:
            _move_new(new, output)
            undo.append(output.unlink)
        for file in companions:
            _move_new(file, output.with_name(file.name))
            undo.append(output.with_name(file.name).unlink)
    except BaseException:
        for step in reversed(undo):
            with contextlib.suppress(OSError):
                step()
        raise
    if before is not None or parts:
        drop_parts(output, older if older.exists() else None)


def _move_new(source: Path, target: Path) -> None:
    try:
        move_new(source, target)
    except FileExistsError as error:
        raise _appeared(target) from error


def _check_same(output: Path, before: Identity) -> None:
    if before is None or identity(output) != before:
        raise _appeared(output)


def _appeared(output: Path) -> EmitError:
    return EmitError(
        "the output exists",
        where=str(output),
        why="it has appeared, or was exchanged, since this run began",
        hint="choose another output, or allow overwriting it, and run again",
    )
