"""Memory: of weights that come from files, and what there is of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_DONTNEED = 4
"""``MADV_DONTNEED`` of Linux: pages of a file leave the process, and come back when read."""

HELD = 4 << 30
"""Bytes of new weights that are held in memory; if there are more, they are in files."""

SMALL = 1 << 20
"""Bytes of a tensor that stays in memory in any case."""

_PAGEMAP = Path("/proc/self/pagemap")
_SWAPPED, _PRESENT, _OF_FILE = (np.uint64(1 << bit) for bit in (62, 63, 61))


def page_out(x: Tensor) -> None:
    """Let the memory go of a tensor that won't be read soon; its contents stay what they are.

    Pages of a mapped file leave the process's memory and come back from the file if they are read
    again, also where other processes have mapped it. Does nothing for a tensor that isn't in a file
    or has been changed in memory, on other systems, on other devices and for small tensors.
    """
    if not sys.platform.startswith("linux") or x.device.type != "cpu" or x.nbytes < SMALL:
        return
    storage = x.untyped_storage()
    start = storage.data_ptr() + int(x.storage_offset()) * x.element_size()
    first = start + -start % mmap.PAGESIZE
    length = (start + x.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if x.is_contiguous() and length > 0 and _unchanged(first, length):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _DONTNEED)


def in_file(x: Tensor, folder: Path) -> Tensor:
    """A copy of a tensor, contiguous, in a file that has no name and goes with its last reader.

    Args:
        x: the tensor; a small one is given back as it is.
        folder: on whose file system the copy is.

    Raises:
        OSError: the file system refuses it.
    """
    if x.nbytes < SMALL:
        return x
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), x.nbytes)
        memory = mmap.mmap(file.fileno(), x.nbytes)
    copy = torch.frombuffer(memory, dtype=x.dtype).view(x.shape)
    copy.copy_(x)
    page_out(copy)
    return copy


def reserve(file: int, size: int) -> None:
    """Give a file its blocks: one that lacks them ends the process when it is written to."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _unchanged(first: int, length: int) -> bool:
    """Whether pages are as in their file, so that letting go of them loses nothing.

    A page that the process has written to is its own, and in no file.
    """
    try:
        with _PAGEMAP.open("rb", buffering=0) as file:
            file.seek(first // mmap.PAGESIZE * 8)
            entries = np.frombuffer(file.read(length // mmap.PAGESIZE * 8), np.uint64)
    except OSError:
        return False
    here = (entries & (_PRESENT | _SWAPPED)) != 0
    whole = len(entries) == length // mmap.PAGESIZE
    return whole and bool(((entries & _OF_FILE) != 0)[here].all())


def available_memory() -> int:
    """Bytes that can be used without swapping; where the system doesn't say, all there are."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
