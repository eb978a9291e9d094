"""y = x W^T for weights in the `bitmap` layout, in plain Triton.

Every weight of a block finds its value by the number of bits set before it: those of the same row
in earlier blocks, a count that is carried along; those in the block's first word; and those in its
own word. The values are gathered from global memory, and the block goes to the tensor cores as a
dense one: load-as-sparse, compute-as-dense, as in Flash-LLM (Xia et al. 2023), but without a tile
in shared memory, which plain Triton can't scatter to. That costs some 18 instructions per weight,
too many for GPUs with HBM; see `strip_gluon` for those.

The sum over columns may be split over programs, for more of them. A split begins amid the values of
a row, so a `Plan` holds how many come before; it depends on the mask only and is worth keeping.
Partial sums are float32 and added in a fixed order: results are the same each time.
"""

# Triton reads annotations of kernels as code, so these have none but constexpr.
# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false
# mypy: disallow-incomplete-defs=false, disallow-untyped-calls=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.bitmap import Bitmap
from ..formats.reference import check_activation

BLOCK_ROWS, BLOCK_COLUMNS = 16, 64
MOST_TOKENS = 64  # of one program
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Plan:
    """What `bitmap_linear` needs of a mask beside the mask.

    Attributes:
        words: [rows, words], int32, the bitmask as little-endian words; a view of it where its
            rows are whole pairs of words, otherwise a padded copy.
        before: [rows, splits], int32, bits that are set in a row before a split.
    """

    words: Tensor
    before: Tensor


def plan(bitmask: Tensor, splits: int = 1) -> Plan:
    """Prepare a mask.

    Args:
        bitmask: [rows, ceil(columns / 8)], uint8.
        splits: of the columns, at most one for each 64.

    Raises:
        ValueError: There can't be so many splits.
    """
    each = BLOCK_COLUMNS // 8
    blocks = -(-bitmask.shape[1] // each)
    if not 1 <= splits <= blocks:
        raise ValueError(f"{splits} splits of {blocks} blocks of columns")
    if bitmask.shape[1] % each or not bitmask.is_contiguous() or bitmask.data_ptr() % 4:
        bitmask = torch.nn.functional.pad(bitmask, (0, -bitmask.shape[1] % each)).contiguous()
    words = bitmask.view(torch.int32)
    if splits == 1:
        return Plan(words, words.new_zeros(len(words), 1))
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts = ((fours + (fours >> 4)) & 0x0F).unflatten(1, (blocks, each)).sum(2)
    before = counts.cumsum(1) - counts
    begins = [i * blocks // splits for i in range(splits)]
    return Plan(words, before[:, begins].to(torch.int32).contiguous())


@triton.jit
def popcount(x):
    """Bits set in words of 32; the compiler makes one instruction of it."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Apply one of `reference.ACTIVATIONS` to float32."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # a NaN stays one
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit(do_not_specialize=["M"])
def bitmap_kernel(
    x_ptr,
    words_ptr,
    offsets_ptr,
    before_ptr,
    values_ptr,
    partials_ptr,
    M,
    N,
    K,
    stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Partial sums, [splits, M, N], float32; the grid is blocks of rows, splits, of tokens.

    UPCAST multiplies in float32: the interpreter does bfloat16 arithmetic wrongly.
    """
    tl.static_assert(COLUMNS == 64)  # two words
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    blocks = tl.cdiv(K, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    inside = row < N
    first = tl.load(offsets_ptr + row, mask=inside, other=0)
    first += tl.load(before_ptr + row.to(tl.int64) * splits + split, mask=inside, other=0)
    word_ptr = words_ptr + row.to(tl.int64) * (blocks * 2)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride + column[None, :]
    bit = (column % 32).to(tl.uint32)[None, :]
    below = (tl.full((1, COLUMNS), 1, tl.uint32) << bit) - 1
    upper = (column >= 32)[None, :]
    acc = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
        low = tl.load(word_ptr + block * 2, mask=inside, other=0).to(tl.uint32, bitcast=True)
        high = tl.load(word_ptr + block * 2 + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
        in_low = popcount(low)
        word = tl.where(upper, high[:, None], low[:, None])
        rank = popcount(word & below) + tl.where(upper, in_low[:, None], 0)
        kept = ((word >> bit) & 1) != 0
        w = tl.load((values_ptr + first)[:, None] + rank, mask=kept, other=0.0)
        seen = (token[:, None] < M) & ((block * COLUMNS + column)[None, :] < K)
        x = tl.load(x_ptrs + block * COLUMNS, mask=seen, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        first += in_low + popcount(high)
    out = partials_ptr + (split.to(tl.int64) * M + token)[:, None] * N + row[None, :]
    tl.store(out, acc, mask=(token[:, None] < M) & inside[None, :])


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    partials_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    splits,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add partial sums in order, then the bias, then activate; the grid is M, blocks of rows."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    token = tl.program_id(0).to(tl.int64)
    at = partials_ptr + token * N + row
    acc = tl.load(at, mask=inside, other=0.0)
    for _ in range(1, splits):
        at += tl.cast(M, tl.int64) * N
        acc += tl.load(at, mask=inside, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    tl.store(y_ptr + token * N + row, acc.to(y_ptr.dtype.element_ty), mask=inside)


def reduce_partials(
    partials: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """activation(sum + bias), the sum of partial sums in the order of the splits.

    Args:
        partials: [splits, tokens, rows], float32, contiguous.
        bias: [rows].
        activation: a name in `reference.ACTIVATIONS`.
        dtype: of the result.

    Returns:
        [tokens, rows].
    """
    splits, tokens, rows = partials.shape
    y = torch.empty(tokens, rows, dtype=dtype, device=partials.device)
    block = 256
    reduce_kernel[(tokens, triton.cdiv(rows, block))](
        partials,
        partials if bias is None else bias.contiguous(),
        y,
        tokens,
        rows,
        splits,
        BIAS=bias is not None,
        ACTIVATION=activation,
        ROWS=block,
    )
    return y


def check_operands(
    x: Tensor, rows: int, columns: int, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The tokens, with columns next to each other.

    Raises:
        ValueError: Shapes, types or devices don't fit.
    """
    check_activation(activation)
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"x has the shape {list(x.shape)} instead of [tokens, {columns}]")
    if x.dtype != values.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {values.dtype}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has the shape {list(bias.shape)} instead of [{rows}]")
    for name, tensor in (("the weight", values), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {tensor.device}")
    return x if x.stride(1) == 1 else x.contiguous()


def bitmap_linear(
    x: Tensor,
    packed: Bitmap,
    bias: Tensor | None = None,
    activation: str = "none",
    prepared: Plan | None = None,
    upcast: bool = False,
) -> Tensor:
    """activation(x W^T + bias).

    Args:
        x: [tokens, columns], float16, bfloat16 or float32. More than 64 tokens decode the weight
            once for each 64.
        packed: the weight W, [rows, columns], of the same type.
        bias: [rows], floating-point.
        activation: a name in `reference.ACTIVATIONS`.
        prepared: what `plan` made of the bitmask; None to make it now, without splits.
        upcast: multiply in float32.

    Returns:
        [tokens, rows], of the type of x.

    Raises:
        ValueError: Shapes, types or devices don't fit.
    """
    rows, columns = packed.shape
    x = check_operands(x, rows, columns, packed.values, bias, activation)
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype} isn't one of {DTYPES}")
    if not len(x):
        return x.new_empty(0, rows)
    prepared = prepared or plan(packed.bitmask)
    if tuple(prepared.words.shape) != (rows, 2 * triton.cdiv(columns, BLOCK_COLUMNS)):
        raise ValueError(f"a plan for words {list(prepared.words.shape)} isn't of this weight")
    splits = prepared.before.shape[1]
    tokens = min(MOST_TOKENS, max(16, triton.next_power_of_2(len(x))))
    partials = torch.empty(splits, len(x), rows, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, BLOCK_ROWS), splits, triton.cdiv(len(x), tokens))
    with torch.cuda.device_of(x):
        bitmap_kernel[grid](
            x,
            prepared.words,
            packed.row_offsets,
            prepared.before,
            packed.values if len(packed.values) else x,  # an empty tensor has no address
            partials,
            len(x),
            rows,
            columns,
            x.stride(0),
            TOKENS=tokens,
            ROWS=BLOCK_ROWS,
            COLUMNS=BLOCK_COLUMNS,
            UPCAST=upcast,
            num_warps=4,
        )
        return reduce_partials(partials, bias, activation, x.dtype)
