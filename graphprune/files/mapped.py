"""Files that shrink while they are mapped into memory.

Weights are mapped, never copied, and whoever reads a page that its file has lost gets SIGBUS, which
ends a process without a word. Here the lost pages become zeros instead, and a note is taken: what
was computed since is worth nothing, and `graphprune.files.sources` says so.

The handler is a function of ours and not of Python's `signal`, whose handlers run only after the
instruction that can't go on. It runs on the thread that reads, in the middle of a load from memory
and never inside an allocator or the interpreter, and that thread may wait for the interpreter's
lock: torch, numpy and ONNX Runtime let go of it before they compute on several threads.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_ADDRESS_LOST = 2  # BUS_ADRERR: no such page any more; others are faults of the hardware
_FIXED = 0x10  # MAP_FIXED
_INFO, _NO_DEFER = 4, 0x40000000  # SA_SIGINFO, SA_NODEFER
_CODE_AT, _ADDRESS_AT = 8, 16  # bytes into siginfo_t

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """``struct sigaction`` of glibc and musl on 64-bit machines."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


lost: list[str] = []
"""Paths of files that pages were missing from, in the order in which it was noticed."""

_lock = threading.Lock()
_users = 0
_before = _Action()


@contextmanager
def guarded() -> Iterator[None]:
    """Have lost pages of mapped files read as zeros, where the system is a known one (Linux)."""
    global _users
    library = _library()
    if library is None:
        yield
        return
    with _lock:
        if _users == 0:
            action = _Action(ctypes.cast(_handle, ctypes.c_void_p).value, flags=_INFO | _NO_DEFER)
            library.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                library.sigaction(signal.SIGBUS, ctypes.byref(_before), None)


def _on_fault(number: int, info: int, _: int) -> None:
    library = _library()
    try:
        if ctypes.c_int.from_address(info + _CODE_AT).value == _ADDRESS_LOST:
            address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
            found = _mapping(address)
            if found is not None:
                _fill(library, address, *found)
                return
    except BaseException:  # nothing can be raised from here
        pass
    library.sigaction(number, ctypes.byref(_before), None)  # the instruction runs again, and faults


_handle = _Handler(_on_fault)


def _mapping(address: int) -> tuple[int, str] | None:
    """End and file of the mapping of an address; None for one that others see too."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            area, access, _, _, _, *path = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(part, 16) for part in area.split("-"))
            if start <= address < end:
                private = access[3] == "p" or access[1] == "-"
                return (end, path[0]) if path and path[0].startswith("/") and private else None
    return None


def _fill(library: Any, address: int, end: int, path: str) -> None:
    """Put zeros in the place of the pages from an address to the end of its mapping."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
    if library.mmap(start, end - start, access, flags, -1, 0) != start:
        raise OSError("no memory")
    lost.append(path)


@cache
def _library() -> Any:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return None
    library = ctypes.CDLL(None)
    library.sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    library.mmap.restype = ctypes.c_size_t
    library.mmap.argtypes = [
        ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
    ]  # fmt: skip
    return library
