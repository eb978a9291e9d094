"""Products whose weights end where a page of memory begins that may not be read.

Called with the path of the library and the name of a variant; a read behind a part ends it.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import torch

from graphprune.kernels import native
from graphprune.kernels.formats.bitmap import Bitmap

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor):
    """A copy that ends at a page without access."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = -(-size // PAGE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    begin = LIBC.mmap(None, (pages + 1) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    end = begin + pages * PAGE
    assert LIBC.mprotect(end, PAGE, 0) == 0
    memory = (ctypes.c_char * size).from_address(end - size)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view_as(tensor)
    return copy.copy_(tensor)


def main(library, variant):
    path = Path(library)
    loaded = path, native.load(path), ""
    native.find_library = lambda: loaded
    native.force_variant(variant)
    torch.manual_seed(0)
    for rows, columns, density in ((5, 61, 0.5), (9, 64, 1.0), (70, 8, 0.1), (3, 200, 0.01)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            dense = torch.randn(rows, columns) * (torch.rand(rows, columns) < density)
            packed = Bitmap.pack(dense.to(dtype))
            parts = {name: guarded(part) for name, part in packed.tensors().items()}
            inside = Bitmap.of_tensors(packed.shape, parts)
            for count in (1, 4, 12):
                x = torch.randn(count, columns).to(dtype)
                expected = native.bitmap_linear(x, packed)
                assert torch.equal(native.bitmap_linear(guarded(x), inside), expected)
    print("fine")


if __name__ == "__main__":
    main(*sys.argv[1:])
