"""The kernel in C++ for processors, called through ctypes.

The library is built with the package where there is a compiler, as ``_native*.so`` beside this
file. Without it `available` is false; torch does the work then (see `reference`).
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .formats.bitmap import Bitmap

VERSION = 1  # GRAPHPRUNE_NATIVE_VERSION in native/bitmap_linear.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

ERRORS = {
    1: "a size or type is out of range",
    2: "row_offsets aren't those of a bitmap of this size",
    3: "the bits of a row contradict row_offsets",
    4: "out of memory",
    5: "this processor or library doesn't have that variant",
}


class NativeError(RuntimeError):
    """The library isn't there, or refused to work."""


class BitmapStruct(ctypes.Structure):
    """`graphprune_bitmap` of the header."""

    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("nonzeros", c_int64),
        ("values", c_void_p),
        ("value_type", c_int32),
        ("bitmask", c_void_p),
        ("row_offsets", c_void_p),
    )


def path() -> Path | None:
    """The library, which ONNX Runtime can register too; None if there is none that fits."""
    return find_library()[0]


def available() -> bool:
    """Whether there is a library that fits this package."""
    return path() is not None


def variant() -> str:
    """Name of the code that the processor gets: avx512_bf16, avx512, avx2 or portable.

    Raises:
        NativeError: There is no library.
    """
    name: bytes = _library().graphprune_variant()
    return name.decode()


def force_variant(name: str | None) -> None:
    """Use another one from now on, for tests; None for the best.

    Raises:
        NativeError: There is no library, or the processor doesn't have it.
    """
    _check(_library().graphprune_force_variant(name.encode() if name else None))


def bitmap_linear(
    x: Tensor, packed: Bitmap, bias: Tensor | None = None, threads: int | None = None
) -> Tensor:
    """Multiply tokens with a packed weight, on the processor.

    Sums are kept in float32 and rounded once. The result doesn't depend on the number of threads.
    Nothing is recorded for gradients.

    Args:
        x: [..., columns], float32, bfloat16 or float16.
        packed: of one of these types too, and such as `Bitmap.validate` accepts: the bits
            themselves aren't looked at again.
        bias: [rows], of the type of x.
        threads: at most that many; None for as many as torch uses.

    Returns:
        [..., rows], of the type of x.

    Raises:
        NativeError: There is no library.
        TypeError: A type isn't one of these, or a tensor isn't in the processor's memory.
        ValueError: A size is wrong.
    """
    library = _library()
    rows, columns = packed.shape
    weight = bitmap_struct(packed)
    _check_tensor("x", x, None)
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x is {list(x.shape)}, but the weight has {columns} columns")
    if bias is not None:
        _check_tensor("bias", bias, x.dtype)
        if bias.shape != (rows,):
            raise ValueError(f"bias is {list(bias.shape)}, but the weight has {rows} rows")
        bias = bias.contiguous()
    if threads is None:
        threads = torch.get_num_threads()
    if threads < 1:
        raise ValueError(f"{threads} threads can't do anything")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    tokens = y.numel() // rows if rows else 0
    status = library.graphprune_bitmap_linear(
        byref(weight),
        TYPES[x.dtype],
        tokens,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        min(threads, 1024),
    )
    _check(status)
    return y


class Prepared:
    """A product with one weight, called without looking at the weight again.

    It is for small layers, whose product takes no longer than the checks of `bitmap_linear`.
    """

    def __init__(self, packed: Bitmap) -> None:
        """Check a weight.

        Args:
            packed: as for `bitmap_linear`; its tensors are kept, and must not be resized.

        Raises:
            NativeError, TypeError, ValueError: See `bitmap_linear`.
        """
        verify(packed)
        self.packed = packed
        self._weight = byref(bitmap_struct(packed))
        self._call = _library().graphprune_bitmap_linear
        self._dtype = packed.values.dtype
        self._type = TYPES[self._dtype]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Multiply tokens.

        Args:
            x: [..., columns], of the dtype of the weight.
            bias: [rows], likewise.

        Returns:
            [..., rows]; None for operands that are anything but plain tensors of that kind.
        """
        rows, columns = self.packed.shape
        if x.dtype != self._dtype or not x.is_cpu or x.shape[-1] != columns or not x.numel():
            return None
        if bias is not None and not (
            bias.is_cpu
            and bias.dtype == self._dtype
            and bias.shape == (rows,)
            and bias.is_contiguous()
        ):
            return None
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], rows))
        status = self._call(
            self._weight,
            self._type,
            y.numel() // rows,
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            min(torch.get_num_threads(), 1024),
        )
        _check(status)
        return y


def verify(packed: Bitmap) -> None:
    """Check bits and offsets, as `Bitmap.validate` does but faster.

    Raises:
        NativeError: There is no library.
        TypeError: A type is wrong.
        ValueError: A size, an offset or a bit is wrong.
    """
    row = c_int64()
    status = _library().graphprune_verify(byref(bitmap_struct(packed)), byref(row))
    _check(status, f" (row {row.value})")


def onnxruntime_calls() -> int:
    """How often ONNX Runtime has run the operator in this process, for tests.

    Raises:
        NativeError: There is no library.
    """
    return int(_library().graphprune_onnxruntime_calls())


def bitmap_struct(packed: Bitmap) -> BitmapStruct:
    """Check types and sizes; the result holds no reference to the tensors."""
    rows, columns = packed.shape
    _check_tensor("values", packed.values, None)
    _check_tensor("bitmask", packed.bitmask, torch.uint8)
    _check_tensor("row_offsets", packed.row_offsets, torch.int64)
    expected = {
        "values": (packed.values, (packed.values.numel(),)),
        "bitmask": (packed.bitmask, (rows, -(-columns // 8))),
        "row_offsets": (packed.row_offsets, (rows,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)} instead of {list(shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} isn't contiguous")
    return BitmapStruct(
        rows,
        columns,
        packed.values.numel(),
        packed.values.data_ptr(),
        TYPES[packed.values.dtype],
        packed.bitmask.data_ptr(),
        packed.row_offsets.data_ptr(),
    )


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    """A dtype of None stands for any floating-point one that the library knows."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor on the cpu, not {tensor.device}")
    if tensor.dtype not in (TYPES if dtype is None else (dtype,)):
        raise TypeError(f"{name} is {tensor.dtype}, not {dtype or 'float32, bfloat16 or float16'}")


def _check(status: int, where: str = "") -> None:
    if status == 0:
        return
    why = ERRORS.get(status, f"status {status}")
    raise (ValueError if status in (1, 2, 3) else NativeError)(why + where)


def _library() -> ctypes.CDLL:
    found, library, why = find_library()
    if found is None or library is None:
        raise NativeError(f"there is no native library: {why}")
    return library


@functools.cache
def find_library() -> tuple[Path | None, ctypes.CDLL | None, str]:
    """Look for the library once: where it is, itself, and why there is none."""
    why = f"no _native*.so beside {Path(__file__).name}"
    folder = Path(__file__).resolve().parent
    newest_first = sorted(folder.glob("_native*.so"), key=lambda file: -file.stat().st_mtime)
    for candidate in newest_first:
        try:
            return candidate, load(candidate), ""
        except OSError as error:  # of another architecture, or an older C library
            why = str(error)
    return None, None, why


def load(file: Path) -> ctypes.CDLL:
    """Open a library and declare its functions.

    Raises:
        OSError: It can't be opened, or belongs to another version of this package.
    """
    library = ctypes.CDLL(str(file.resolve()))
    try:
        library.graphprune_native_version.restype = c_int32
        version = library.graphprune_native_version()
        library.graphprune_variant.restype = c_char_p
        library.graphprune_force_variant.argtypes = [c_char_p]
        library.graphprune_verify.argtypes = [POINTER(BitmapStruct), POINTER(c_int64)]
        library.graphprune_onnxruntime_calls.restype = c_int64
        linear = library.graphprune_bitmap_linear
        linear.restype = c_int
        linear.argtypes = [
            POINTER(BitmapStruct),
            c_int32,
            c_int64,
            c_void_p,
            c_void_p,
            c_void_p,
            c_int32,
        ]
    except AttributeError as error:
        raise OSError(f"{file}: {error}") from error
    if version != VERSION:
        raise OSError(f"{file}: version {version} instead of {VERSION}")
    return library
