"""Locks on outputs: the kernel lets go of them when a process ends, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

from graphprune.errors import EmitError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"


def lock(holder: Path, output: Path) -> int | None:
    """Lock a directory, which is made, for this process.

    Args:
        holder: the directory.
        output: what it is locked for.

    Returns:
        A file descriptor that keeps the lock; None if the file system has no locks.

    Raises:
        EmitError: another process, or another thread of this one, has the lock.
        OSError: the file system refused.
    """
    if fcntl is None:
        return None
    file = holder / LOCK
    while True:
        holder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # removed by its last owner just now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed it between the two calls.
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise EmitError(
                "another run is writing here",
                where=str(output),
                why=f"it holds {file}",
                hint="wait until it ends, or choose another output",
            ) from None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            unlock(holder, None)
            return None
        os.close(descriptor)


def unlock(holder: Path, descriptor: int | None) -> None:
    """Remove an empty locked directory, and let go of it."""
    try:
        (holder / LOCK).unlink(missing_ok=True)
        holder.rmdir()
    except OSError:
        pass  # not empty: the next owner is in it already
    if descriptor is not None:
        os.close(descriptor)
