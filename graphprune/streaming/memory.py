"""Memory of weights that come from files."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_PAGEOUT = 21
"""``MADV_PAGEOUT`` of Linux 5.4: what is unchanged in a file needn't stay in memory."""

_SMALL = 1 << 20


def page_out(x: Tensor) -> None:
    """Tell the kernel that a tensor won't be read soon; its contents stay what they are.

    Pages of a mapped file leave the process's memory and come back from the file if they are read
    again. Does nothing on other systems, on other devices and for small tensors.
    """
    if not sys.platform.startswith("linux") or x.device.type != "cpu" or x.nbytes < _SMALL:
        return
    storage = x.untyped_storage()
    start = storage.data_ptr() + int(x.storage_offset()) * x.element_size()
    first = start + -start % mmap.PAGESIZE
    length = (start + x.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if x.is_contiguous() and length > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _PAGEOUT)
