"""y = x W^T for weights in the `strip_u8` layout, in Gluon.

Load-as-sparse, compute-as-dense, as in Flash-LLM (Xia et al. 2023): a block fills a tile of 64 rows
and 256 columns in shared memory with zeros, scatters the values of a strip tile to their columns,
and hands the dense tile to the tensor cores, weights as M and tokens as N. The packed words of the
next tile are on their way to registers meanwhile. Weights cross the memory bus packed only.

    thread   16 rows of a warp x 2 halves of a chunk; 8 slots of every chunk of its row
    words    4 of values and 2 of columns per chunk, as in memory
    scatter  instruction j of a chunk writes slots j and 8 + j of 16 rows: see `strip._order`

Tensors need sizes that are powers of two, so chunks are cut into groups of such sizes. Tiles of a
row of tiles may be split over blocks, for more of them; partial sums are float32 and added in a
fixed order, so results are the same each time. Import fails without `gluon_api.AVAILABLE`.
"""

# Triton reads annotations of kernels as code, so these have none but constexpr.
# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false
# mypy: disallow-incomplete-defs=false, disallow-untyped-calls=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gluon_api
from .bitmap_triton import check_operands, reduce_partials
from .gluon_api import gl, gluon, mma_v2, reinterpret
from .strip import CHUNK, COLUMNS, ROWS

if not gluon_api.AVAILABLE:
    raise ImportError(gluon_api.REASON)

DTYPES = (torch.float16, torch.bfloat16)
MOST_TOKENS = 64  # of one block
BLOCKS_PER_PROCESSOR = 4  # by the registers of the kernel for 8 tokens


@gluon.constexpr_function
def group_start(chunks: int, group: int) -> int:
    """Where a group of chunks begins: the greatest powers of two first."""
    start = 0
    for _ in range(group):
        start += 1 << ((chunks - start).bit_length() - 1)
    return start


@gluon.constexpr_function
def group_size(chunks: int, group: int) -> int:
    """Chunks of a group."""
    start: int = group_start(chunks, group)
    return 1 << ((chunks - start).bit_length() - 1)


@gluon.constexpr_function
def group_count(chunks: int) -> int:
    """Groups of the chunks."""
    return chunks.bit_count()


@gluon.constexpr_function
def word_layout(width: int, chunks: int) -> Any:
    """Which thread has which of [64, width * chunks] elements, of which a chunk has `width`."""
    half = width // 2
    registers = [[0, 1 << i] for i in range(half.bit_length() - 1)]
    registers += [[0, width << i] for i in range(chunks.bit_length() - 1)]
    lanes = [[0, half], [1, 0], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16, 0], [32, 0]], [], [64, width * chunks]
    )


@gluon.jit
def split_begin(split, across, splits):
    """The first tile of a split."""
    return split * across // splits


@gluon.jit
def word_offset(row, place, WIDTH: gl.constexpr):
    """Where a row's words lie after the begin of a group of chunks of WIDTH words each."""
    return (place // WIDTH) * (64 * WIDTH) + row * WIDTH + place % WIDTH


@gluon.jit
def turned(columns, row):
    """Four columns in a word, as places of a row in the swizzled tile.

    Pieces of eight columns are exchanged by XOR with the row. The tile is written by way of a view
    without swizzle, so that one instruction turns four columns.
    """
    return columns ^ ((row % 8) * 0x08080808)


@gluon.constexpr_function
def byte_instruction(index: int) -> str:
    """PTX for a byte of a word, three bytes of zero above it."""
    return f"prmt.b32 $0, $1, 0, 0x444{index};"


@gluon.jit
def byte(words, INDEX: gl.constexpr):
    """A byte of words; LLVM would turn a shift into two instructions and an addition."""
    return gl.inline_asm_elementwise(
        byte_instruction(INDEX), "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def load_words(pointer, WIDTH: gl.constexpr, CHUNKS: gl.constexpr, mask):
    """Words of a group of chunks, [64, WIDTH * CHUNKS]."""
    layout: gl.constexpr = word_layout(WIDTH, CHUNKS)
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    place = gl.arange(0, WIDTH * CHUNKS, gl.SliceLayout(0, layout))[None, :]
    return gl.load(pointer + word_offset(row, place, WIDTH), mask=mask)


@gluon.jit
def load_tile(values_ptr, columns_ptr, CHUNKS: gl.constexpr, mask):
    """The packed words of a tile: tuples with an element per group of chunks."""
    values = ()
    columns = ()
    for g in gl.static_range(group_count(CHUNKS)):
        value = load_words(
            values_ptr + group_start(CHUNKS, g) * 512, 8, group_size(CHUNKS, g), mask
        )
        column = load_words(
            columns_ptr + group_start(CHUNKS, g) * 256, 4, group_size(CHUNKS, g), mask
        )
        # Triton knows no starred expressions.
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
        columns = columns + (column,)  # type: ignore[assignment]  # noqa: RUF005
    return values, columns


@gluon.jit
def scatter_group(tile, values, columns, CHUNKS: gl.constexpr):
    """Write a group of chunks to the tile, an int16 view of it without swizzle."""
    slots: gl.constexpr = word_layout(16, CHUNKS)
    pair = gl.join(values.to(gl.int16), (values >> 16).to(gl.int16))
    value = gl.reshape(pair, [64, 16 * CHUNKS])
    row = gl.arange(0, 64, gl.SliceLayout(1, word_layout(4, CHUNKS)))[:, None]
    columns = turned(columns, row)
    even = gl.join(byte(columns, 0), byte(columns, 2))
    odd = gl.join(byte(columns, 1), byte(columns, 3))
    place = gl.reshape(gl.join(even, odd), [64, 16 * CHUNKS])
    tile.scatter(
        gl.convert_layout(value, slots, assert_trivial=True),
        gl.convert_layout(place, slots, assert_trivial=True),
        1,
    )


@gluon.jit(do_not_specialize=["M"])
def strip_kernel(
    x_ptr,
    values_ptr,
    columns_ptr,
    partials_ptr,
    M,
    N,
    K,
    stride,
    across,
    splits,
    TOKENS: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """Partial sums, [splits, M, N], float32; the grid is rows of tiles, splits, blocks of tokens.

    `values_ptr` and `columns_ptr` point to the packed parts as int32. Needs four warps.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8]
    )
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    tokens: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    w_tile = gl.allocate_shared_memory(dtype, [64, 256], swizzled)
    x_tile = gl.allocate_shared_memory(dtype, [TOKENS, 256], swizzled)
    zeros = gl.zeros((64, 256), dtype, wide)
    acc = gl.zeros((64, TOKENS), gl.float32, mma)
    down = gl.program_id(0)
    split = gl.program_id(1)
    first = gl.program_id(2) * TOKENS
    begin = split_begin(split, across, splits)
    end = split_begin(split + 1, across, splits)
    # Counts in a tile fit 32 bits; those in a whole weight may not.
    tile = down.to(gl.int64) * across + begin
    values_ptr += tile * (CHUNKS * 512)
    columns_ptr += tile * (CHUNKS * 256)
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(1, wide))[:, None]
    column = gl.arange(0, 256, gl.SliceLayout(0, wide))[None, :]
    x_ptrs = x_ptr + token.to(gl.int64) * stride + column
    values, columns = load_tile(values_ptr, columns_ptr, CHUNKS, begin < end)
    for k in range(begin, end):
        x = gl.load(x_ptrs + k * 256, mask=(token < M) & (k * 256 + column < K), other=0.0)
        w_tile.store(zeros)
        view = reinterpret(w_tile, gl.int16, [64, 256], plain)
        for g in gl.static_range(group_count(CHUNKS)):
            scatter_group(view, values[g], columns[g], group_size(CHUNKS, g))
        values_ptr += CHUNKS * 512
        columns_ptr += CHUNKS * 256
        values, columns = load_tile(values_ptr, columns_ptr, CHUNKS, k + 1 < end)
        x_tile.store(x)
        acc = mma_v2(w_tile.load(weights), x_tile.permute((1, 0)).load(tokens), acc)
    row = down * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))[None, :]
    partials_ptr += (split.to(gl.int64) * M + first) * N
    inside = (row < N) & (first + token < M)
    gl.store(partials_ptr + token.to(gl.int64) * N + row, acc, mask=inside)


def choose_splits(down: int, across: int, tokens: int, processors: int) -> int:
    """How many blocks share a row of tiles.

    As many as the GPU holds at once, by `BLOCKS_PER_PROCESSOR`, or by half of that where there are
    more than 16 tokens, whose partial sums weigh; of those that take equally long, the fewest.
    `down` is the number of rows of tiles, `across` that of tiles in each.
    """
    blocks = down * -(-tokens // MOST_TOKENS)
    room = processors * (BLOCKS_PER_PROCESSOR if tokens <= 16 else BLOCKS_PER_PROCESSOR // 2)
    splits = max(1, min(across, room // blocks))
    return -(-across // -(-across // splits))


def strip_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    activation: str = "none",
    splits: int | None = None,
) -> Tensor:
    """activation(x W^T + bias).

    Args:
        x: [tokens, columns], float16 or bfloat16, on an NVIDIA GPU from sm_80 on. More than 64
            tokens decode the weight once for each 64.
        values: [tile rows, tile columns, chunks, 64, 16], of the same type; see `Strip`.
        columns: the same shape, uint8.
        shape: rows and columns of the weight.
        bias: [rows], floating-point.
        activation: a name in `reference.ACTIVATIONS`.
        splits: of the columns; None to fill the GPU.

    Returns:
        [tokens, rows], of the type of x.

    Raises:
        ValueError: Shapes, types or devices don't fit, or there can't be so many splits.
    """
    rows, width = shape
    x = check_operands(x, rows, width, values, bias, activation)
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype} isn't one of {DTYPES}")
    down, across = -(-rows // ROWS), -(-width // COLUMNS)
    tiles = (down, across, values.shape[2] if values.dim() == 5 else 0, ROWS, CHUNK)
    for name, part in (("values", values), ("columns", columns)):
        if tuple(part.shape) != tiles or not part.is_contiguous() or part.data_ptr() % 16:
            raise ValueError(
                f"{name} of shape {list(part.shape)} aren't contiguous, at a multiple of 16 bytes, "
                f"and of the shape [{down}, {across}, chunks, {ROWS}, {CHUNK}]"
            )
    if x.device.type != "cuda":
        raise ValueError(f"x is on {x.device}, not on a GPU")
    if splits is None:
        gpu = torch.cuda.get_device_properties(x.device)
        splits = choose_splits(down, across, len(x), gpu.multi_processor_count)
    if not 1 <= splits <= across:
        raise ValueError(f"{splits} splits of {across} strips")
    if not len(x):
        return x.new_empty(0, rows)
    tokens = min(MOST_TOKENS, max(8, 1 << (len(x) - 1).bit_length()))
    partials = torch.empty(splits, len(x), rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        strip_kernel[(down, splits, -(-len(x) // tokens))](
            x,
            values.view(torch.int32),
            columns.view(torch.int32),
            partials,
            len(x),
            rows,
            width,
            x.stride(0),
            across,
            splits,
            TOKENS=tokens,
            CHUNKS=tiles[2],
            num_warps=4,
        )
        return reduce_partials(partials, bias, activation, x.dtype)
