"""Linear layers with packed weights as operators of torch: one per format, ``y = act(x W^T + b)``.

They are registered with `torch.library`, so that torch.compile and torch.export see one node whose
parts are ordinary tensors. Which kernel runs depends on the device, on the dtype and on the number
of tokens; where there is none, or more tokens than it is made for, the weight is unpacked and
multiplied as a dense one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import native
from .formats.bitmap import Bitmap
from .formats.block import Block
from .formats.csr import CSR
from .formats.files import FORMATS
from .formats.nm24 import NM24
from .formats.packed import Packed
from .formats.reference import ACTIVATIONS, check_activation
from .formats.strip import Strip

TOKENS = 64
"""More tokens than this are worth unpacking a weight for, but for the kernel in C++."""

_SCHEMA = (
    "(Tensor x, Tensor[] parts, int rows, int columns, Tensor? bias, str activation) -> Tensor"
)


def linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Multiply by a packed weight.

    Args:
        x: [..., columns], of the dtype of the weight's values.
        packed: the weight, [rows, columns].
        bias: [rows].
        activation: a name in `reference.ACTIVATIONS`.

    Returns:
        [..., rows], of the dtype of x.

    Raises:
        ValueError: Shapes or dtypes don't fit.
    """
    operator = getattr(torch.ops.graphprune, f"{packed.format}_linear")
    parts = list(packed.tensors().values())
    flat = x[None] if x.dim() == 1 else x
    found: Tensor = operator(flat, parts, *packed.shape, bias, activation)
    return found[0] if x.dim() == 1 else found


def _compute(
    format: str,
    x: Tensor,
    parts: list[Tensor],
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    check_columns(x, columns)
    packed = _packed(format, parts, rows, columns)
    _check(x, packed, parts[0], bias, activation)
    flat = x.reshape(-1, x.shape[-1])
    kernel = _KERNELS.get((format, x.device.type))
    y = None
    slow = format not in ("bitmap", "nm24") or x.device.type != "cpu"
    many = slow and len(flat) > TOKENS
    if kernel is not None and len(flat) and not many:
        y = kernel(flat, packed, bias, activation)
    if y is None:
        y = ACTIVATIONS[activation](functional.linear(flat, packed.unpack(), bias))
    return y.contiguous().view(*x.shape[:-1], rows)


def check_columns(x: Tensor, columns: int) -> None:
    """See that tokens have as many columns as the weight.

    Raises:
        ValueError: They don't.
    """
    if x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"the input has the shape {list(x.shape)}, not [..., {columns}]")


def _packed(format: str, parts: list[Tensor], rows: int, columns: int) -> Any:
    kind = FORMATS[format]
    names = _PARTS[format]
    if len(parts) != len(names):
        raise ValueError(f"{format}: {len(parts)} tensors instead of {', '.join(names)}")
    return kind.of_tensors((rows, columns), dict(zip(names, parts, strict=True)))


def _check(x: Tensor, packed: Any, values: Tensor, bias: Tensor | None, activation: str) -> None:
    check_activation(activation)
    if x.dtype != values.dtype:
        raise ValueError(f"the input is {x.dtype}, the weight {values.dtype}")
    if bias is not None and bias.shape != (packed.shape[0],):
        raise ValueError(f"the bias has the shape {list(bias.shape)}, not [{packed.shape[0]}]")
    if not _fits(packed):
        rows, columns = packed.shape
        raise ValueError(f"{rows} outputs of {columns} inputs don't fit the parts of the weight")


def _fits(packed: Any) -> bool:
    """Whether the parts are those of such a shape, as far as their own shapes tell."""
    rows, columns = packed.shape
    if packed.format in ("bitmap", "nm24"):
        return tuple(packed.bitmask.shape) == (rows, -(-columns // 8))
    if packed.format == "strip_u8":
        return tuple(packed.values.shape[:2]) == (-(-rows // 64), -(-columns // 256))
    if packed.format == "block":
        side: int = packed.side
        return columns % side == 0 and tuple(packed.row_offsets.shape) == (rows // side + 1,)
    return tuple(packed.row_offsets.shape) == (rows + 1,)


def _bitmap_cpu(x: Tensor, packed: Bitmap, bias: Tensor | None, activation: str) -> Tensor | None:
    if not native.available() or x.dtype not in native.TYPES:
        return None
    return ACTIVATIONS[activation](native.bitmap_linear(x.contiguous(), packed, bias))


def _nm24_cpu(x: Tensor, packed: NM24, bias: Tensor | None, activation: str) -> Tensor | None:
    bitmap = packed.as_bitmap()
    return None if bitmap is None else _bitmap_cpu(x, bitmap, bias, activation)


def _nm24_cuda(x: Tensor, packed: NM24, bias: Tensor | None, activation: str) -> Tensor | None:
    bitmap = packed.as_bitmap()
    return None if bitmap is None else _bitmap_cuda(x, bitmap, bias, activation)


def _csr_cpu(x: Tensor, packed: CSR, bias: Tensor | None, activation: str) -> Tensor | None:
    if x.dtype != torch.float32:
        return None
    _told_once()
    weight = torch.sparse_csr_tensor(
        packed.row_offsets, packed.columns, packed.values, packed.shape, check_invariants=False
    )
    # torch's own linear copies the product of several tokens more slowly than this.
    y = (weight @ x.T.contiguous()).T if len(x) > 1 else (weight @ x[0])[None]
    return ACTIVATIONS[activation](y if bias is None else y + bias)


def _block_any(x: Tensor, packed: Block, bias: Tensor | None, activation: str) -> Tensor | None:
    if x.dtype != torch.float32 or x.device.type != "cpu" or not len(packed.values):
        return None
    _told_once()
    weight = torch.sparse_bsr_tensor(
        packed.row_offsets,
        packed.block_columns.long(),
        packed.values,
        packed.shape,
        check_invariants=False,
    )
    return ACTIVATIONS[activation](functional.linear(x, weight, bias))


@cache
def _told_once() -> None:
    """Have torch say now, to nobody, that its sparse tensors are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(16).to_sparse_csr()


def _bitmap_cuda(x: Tensor, packed: Bitmap, bias: Tensor | None, activation: str) -> Tensor | None:
    from .gpu import bitmap_triton

    return bitmap_triton.bitmap_linear(x, packed, bias, activation)


def _strip_cuda(x: Tensor, packed: Strip, bias: Tensor | None, activation: str) -> Tensor | None:
    from .gpu import gluon_api

    if not gluon_api.AVAILABLE or x.dtype not in (torch.float16, torch.bfloat16):
        return None
    from .gpu import strip_gluon

    return strip_gluon.strip_linear(x, packed.values, packed.places, packed.shape, bias, activation)


_KERNELS: Mapping[tuple[str, str], Callable[..., Tensor | None]] = {
    ("bitmap", "cpu"): _bitmap_cpu,
    ("bitmap", "cuda"): _bitmap_cuda,
    ("nm24", "cpu"): _nm24_cpu,
    ("nm24", "cuda"): _nm24_cuda,
    ("strip_u8", "cuda"): _strip_cuda,
    ("csr", "cpu"): _csr_cpu,
    ("block", "cpu"): _block_any,
}

_PARTS: Mapping[str, tuple[str, ...]] = {
    "bitmap": ("compressed", "bitmask", "row_offsets"),
    "strip_u8": ("values", "places"),
    "nm24": ("compressed", "bitmask"),
    "block": ("values", "block_columns", "row_offsets"),
    "csr": ("values", "columns", "row_offsets"),
}


def _remember(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, parts, rows, columns, bias, activation = inputs
    if activation != "none":
        raise NotImplementedError(
            "a packed layer with an activation has no gradient: apply the activation outside"
        )
    ctx.parts, ctx.size, ctx.biased = parts, (rows, columns), bias is not None


def _backward(format: str) -> Callable[..., tuple[Any, ...]]:
    """Gradients of tokens and bias; weights are fixed."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        packed = FORMATS[format].of_tensors(
            ctx.size, dict(zip(_PARTS[format], ctx.parts, strict=True))
        )
        bias = grad.flatten(0, -2).sum(0) if ctx.biased else None
        return grad @ packed.unpack(), [None] * len(ctx.parts), None, None, bias, None

    return backward


def _register(format: str) -> None:
    name = f"graphprune::{format}_linear"
    torch.library.define(name, _SCHEMA)

    def compute(
        x: Tensor,
        parts: list[Tensor],
        rows: int,
        columns: int,
        bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        return _compute(format, x, parts, rows, columns, bias, activation)

    def fake(
        x: Tensor,
        parts: list[Tensor],
        rows: int,
        columns: int,
        bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        check_columns(x, columns)
        return x.new_empty((*x.shape[:-1], rows))

    torch.library.impl(name, "CompositeExplicitAutograd", compute)
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, _backward(format), setup_context=_remember)


for _format in FORMATS:
    _register(_format)
