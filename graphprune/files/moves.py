"""Renames in one step that never replace anything by mistake.

Linux has ``renameat2``: without replacing, or exchanging two names. Where the system or the file
system doesn't know it,

* a file is moved by a link and the removal of its old name, which doesn't replace anything either;
  where there are no hard links (FAT), by a look and a rename, and what appears in between is lost;
* two directories can't be exchanged, and `exchange` says so.

A directory needs none of that to replace nothing but an empty one: ``rename`` refuses the rest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD
_NO_REPLACE, _EXCHANGE = 1, 2
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}
_OCCUPIED = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


def move_new(source: Path, target: Path) -> None:
    """Give a file or a directory a name that nothing has; an empty directory counts as nothing.

    Raises:
        FileExistsError: something has it.
        OSError: the file system refused.
    """
    if source.is_dir() and not source.is_symlink():
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno in _OCCUPIED:
                raise FileExistsError(
                    errno.EEXIST, os.strerror(errno.EEXIST), str(target)
                ) from error
            raise
    elif not _renamed(source, target, _NO_REPLACE):
        _move_file(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the file system can't.

    Raises:
        OSError: the file system refused.
    """
    return _renamed(one, other, _EXCHANGE)


def set_aside(file: Path, link: Path) -> None:
    """Give a file that is about to be replaced a second name, where there are hard links."""
    try:
        os.link(file, link, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _UNKNOWN | {errno.EMLINK}:
            raise


def identity(path: Path) -> tuple[int, int] | None:
    """What tells the thing that has a name from another that gets it later; None for nothing."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def flush(path: Path) -> None:
    """Have a file, or a directory with all that it holds, written to the disk.

    Raises:
        OSError: it can't be; some file systems say only now that they are full.
    """
    if os.name == "nt":  # which has no such call for what is open to be read
        return
    for file in (path, *(path.rglob("*") if path.is_dir() else ())):
        if file.is_symlink():
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
        finally:
            os.close(descriptor)


def _move_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        if os.path.lexists(target):
            raise _occupied(target) from None
        os.rename(source, target)
        return
    os.unlink(source)


def _occupied(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def _renamed(source: Path, target: Path, flag: int) -> bool:
    """Whether ``renameat2`` knows a flag and has renamed."""
    rename = renameat2()
    if rename is None:
        return False
    sys.audit("graphprune.rename", str(source), str(target))
    if rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def renameat2() -> Any:
    """Linux's function of that name; None where the system has none."""
    if not sys.platform.startswith("linux"):
        return None
    found = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if found is not None:
        path = ctypes.c_char_p
        found.argtypes = [ctypes.c_int, path, ctypes.c_int, path, ctypes.c_uint]
    return found
