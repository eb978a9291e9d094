"""y = x W^T for weights in the `strip_u8` layout, in Gluon.

Load-as-sparse, compute-as-dense, as in Flash-LLM (Xia et al. 2023): a block fills a tile of 64 rows
and 256 columns in shared memory with zeros, scatters the values of a strip tile to their places,
and hands the dense tile to the tensor cores, weights as M and tokens as N. The packed words of the
next tile are on their way to registers meanwhile, and the tokens of this one to shared memory.
Weights cross the memory bus packed only.

    thread   16 rows of a warp x 2 halves of a chunk; 8 slots of every chunk of its row
    words    4 of values and 2 of places per chunk, as in memory
    scatter  instruction j of a chunk writes slots j and 8 + j of 16 rows: see `strip._order`

The scatter is two instructions per value, an address and a store, and a third for every other one,
to halve a word. Triton's own takes an instruction more for each, and older versions have none; so
it is written in PTX, which has to know where the tile lies. It is the beginning of the only
allocation of shared memory, hence of shared memory; `check_shared` sees to it that nothing else is.

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

from ..formats.strip import CHUNK, COLUMNS, ROWS
from . import gluon_api
from .bitmap_triton import check_operands, reduce_partials
from .gluon_api import (
    async_load,
    barrier,
    commit_group,
    gl,
    gluon,
    mma_v2,
    reinterpret,
    wait_group,
)

if not gluon_api.AVAILABLE:
    raise ImportError(gluon_api.REASON)

DTYPES = (torch.float16, torch.bfloat16)
MOST_TOKENS = 64  # of one block
BLOCKS_PER_PROCESSOR = 4  # by the registers of the kernel for 8 tokens
PART = gl.constexpr(gluon_api.VIEWS_OF_A_PART)  # else tiles of fewer tokens have unused rows


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


@gluon.constexpr_function
def token_layout(tokens: int) -> Any:
    """Which thread has which of [tokens, 256] elements of x.

    Eight threads that store together hold pieces of eight columns of eight tokens, which the
    swizzle puts into different banks. A thread has few tokens, so few addresses.
    """
    rows = [[1 << i, 0] for i in range(tokens.bit_length() - 1)]
    pieces = [[0, 8 << i] for i in range(5)]
    bases = rows[:3] + pieces[:2] + rows[3:] + pieces[2:]
    registers = [[0, 1], [0, 2], [0, 4], *bases[7:]]
    return gl.DistributedLinearLayout(registers, bases[:5], bases[5:7], [], [tokens, 256])


@gluon.constexpr_function
def scatter_instructions() -> str:
    """PTX that writes the four values of words $2 and $3 to the places in the bytes of $1.

    A dot product of four bytes multiplies a place by the size of a value and adds the address of
    the row, $4, in one instruction.
    """
    lines = ["{", ".reg .b32 address;", ".reg .b16 low, high;", "mov.b32 $0, 0;"]
    for slot in range(4):
        if slot % 2 == 0:
            lines.append(f"mov.b32 {{low, high}}, ${2 + slot // 2};")
        lines.append(f"dp4a.u32.u32 address, $1, {2 << 8 * slot}, $4;")
        lines.append(f"st.shared.b16 [address], {('low', 'high')[slot % 2]};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def address_instructions() -> str:
    """PTX for the address of row $1 of the tile of weights."""
    lines = ["{", ".reg .b32 begin;", "mov.b32 begin, global_smem;"]
    return "\n".join([*lines, "mad.lo.u32 $0, $1, 512, begin;", "}"])


@gluon.jit
def split_begin(split, across, splits):
    """The first tile of a split."""
    return split * across // splits


@gluon.jit
def word_offset(row, place, WIDTH: gl.constexpr):
    """Where a row's words lie after the begin of a group of chunks of WIDTH words each."""
    return (place // WIDTH) * (64 * WIDTH) + row * WIDTH + place % WIDTH


@gluon.jit
def load_words(pointer, WIDTH: gl.constexpr, CHUNKS: gl.constexpr):
    """Words of a group of chunks, [64, WIDTH * CHUNKS]."""
    layout: gl.constexpr = word_layout(WIDTH, CHUNKS)
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    place = gl.arange(0, WIDTH * CHUNKS, gl.SliceLayout(0, layout))[None, :]
    return gl.load(pointer + word_offset(row, place, WIDTH))


@gluon.jit
def load_tile(values_ptr, places_ptr, CHUNKS: gl.constexpr):
    """The packed words of a tile: tuples with an element per group of chunks."""
    values = ()
    places = ()
    for g in gl.static_range(group_count(CHUNKS)):
        value = load_words(values_ptr + group_start(CHUNKS, g) * 512, 8, group_size(CHUNKS, g))
        place = load_words(places_ptr + group_start(CHUNKS, g) * 256, 4, group_size(CHUNKS, g))
        # Triton knows no starred expressions.
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
        places = places + (place,)  # type: ignore[assignment]  # noqa: RUF005
    return values, places


@gluon.jit
def allocate_tiles(dtype: gl.constexpr, TOKENS: gl.constexpr):
    """Shared memory for a tile of weights and, behind it, one of tokens."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    rows: gl.constexpr = TOKENS if PART else 64
    return gl.allocate_shared_memory(dtype, [64 // rows + 1, rows, 256], layout)


@gluon.jit
def weight_tile(tiles):
    """The tile of weights, [64, 256]."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    return reinterpret(tiles, tiles.dtype, [64, 256], layout) if PART else tiles.index(0)


@gluon.jit
def token_tile(tiles, TOKENS: gl.constexpr):
    """The tile of tokens, [TOKENS, 256]."""
    return tiles.index(64 // TOKENS) if PART else tiles.index(1).slice(0, TOKENS)


@gluon.jit
def row_address(row):
    """Address of a row of the tile of weights."""
    return gl.inline_asm_elementwise(
        address_instructions(), "=r,r", [row], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def scatter_group(values, places, CHUNKS: gl.constexpr):
    """Write a group of chunks to the tile of weights."""
    layout: gl.constexpr = word_layout(4, CHUNKS)
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    first, second = gl.split(gl.reshape(values, [64, 4 * CHUNKS, 2]))
    first = gl.convert_layout(first, layout, assert_trivial=True)
    second = gl.convert_layout(second, layout, assert_trivial=True)
    gl.inline_asm_elementwise(
        scatter_instructions(),
        "=r,r,r,r,r",
        [places, first, second, row_address(row)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def scatter_tile(values, places, CHUNKS: gl.constexpr):
    """Write the values of a tile."""
    for g in gl.static_range(group_count(CHUNKS)):
        scatter_group(values[g], places[g], group_size(CHUNKS, g))


@gluon.jit
def clear(tile):
    """Write zeros; all of them are there when it returns."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    tile.store(gl.zeros((64, 256), tile.dtype, wide))
    barrier()


@gluon.jit
def multiply(weights, tokens, acc):
    """Add W x^T to acc, of tiles that threads have written when they call it."""
    left: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, acc.type.layout, 2)
    barrier()
    return mma_v2(weights.load(left), tokens.permute((1, 0)).load(right), acc)


@gluon.jit(do_not_specialize=["M"])
def strip_kernel(
    x_ptr,
    values_ptr,
    places_ptr,
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

    `values_ptr` and `places_ptr` point to the packed parts as int32. Needs four warps, at least one
    token, at most as many splits as there are tiles in a row, and `x_ptr` and `stride` that are
    multiples of 16.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8]
    )
    pieces: gl.constexpr = token_layout(TOKENS)
    tiles = allocate_tiles(x_ptr.dtype.element_ty, TOKENS)
    weights = weight_tile(tiles)
    tokens = token_tile(tiles, TOKENS)
    acc = gl.zeros((64, TOKENS), gl.float32, mma)
    down = gl.program_id(0)
    split = gl.program_id(1)
    first = gl.program_id(2) * TOKENS
    begin = split_begin(split, across, splits)
    last = split_begin(split + 1, across, splits) - 1
    # Counts in a tile fit 32 bits; those in a whole weight may not.
    tile = down.to(gl.int64) * across + begin
    values_ptr += tile * (CHUNKS * 512)
    places_ptr += tile * (CHUNKS * 256)
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(1, pieces))[:, None]
    column = gl.arange(0, 256, gl.SliceLayout(0, pieces))[None, :]
    # Tokens after the last one read it again: what becomes of them isn't stored.
    x_ptrs = x_ptr + gl.minimum(token, M - 1).to(gl.int64) * stride + begin * 256 + column
    values, places = load_tile(values_ptr, places_ptr, CHUNKS)
    for _ in range(begin, last):
        clear(weights)
        async_load(tokens, x_ptrs)
        commit_group()
        scatter_tile(values, places, CHUNKS)
        x_ptrs += 256
        values_ptr += CHUNKS * 512
        places_ptr += CHUNKS * 256
        values, places = load_tile(values_ptr, places_ptr, CHUNKS)
        wait_group(0)
        acc = multiply(weights, tokens, acc)
    # Only the last tile may have fewer columns, and nothing is left to load meanwhile.
    x = gl.load(x_ptrs, mask=last * 256 + column < K, other=0.0)
    clear(weights)
    tokens.store(x)
    scatter_tile(values, places, CHUNKS)
    acc = multiply(weights, tokens, acc)
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


def shared_bytes(tokens: int) -> int:
    """Shared memory of a block for so many tokens."""
    return (64 + (tokens if PART.value else 64)) * 256 * 2


def check_shared(found: int, tokens: int) -> None:
    """See that the tile of weights begins where shared memory does.

    Args:
        found: bytes that the compiled kernel takes.
        tokens: of a block.

    Raises:
        RuntimeError: The compiler added something to the one allocation.
    """
    if found != shared_bytes(tokens):
        raise RuntimeError(
            f"strip_kernel for {tokens} tokens has {found} bytes of shared memory instead of "
            f"{shared_bytes(tokens)}: this version of triton lays it out in another way; unpack "
            "the weight, or take the bitmap format"
        )


def aligned(x: Tensor) -> Tensor:
    """x, [tokens, columns], with tokens 16 bytes apart or a multiple, for copies of 16 bytes.

    Triton knows only of strides that are multiples of 16 elements.
    """
    if x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0:
        return x
    room = x.new_empty(len(x), -(-x.shape[1] // 16) * 16)
    return room[:, : x.shape[1]].copy_(x)


def strip_linear(
    x: Tensor,
    values: Tensor,
    places: Tensor,
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
        places: the same shape, uint8.
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
    for name, part in (("values", values), ("places", places)):
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
    x = aligned(x)
    tokens = min(MOST_TOKENS, max(8, 1 << (len(x) - 1).bit_length()))
    partials = torch.empty(splits, len(x), rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        compiled = strip_kernel[(down, splits, -(-len(x) // tokens))](
            x,
            values.view(torch.int32),
            places.view(torch.int32),
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
        check_shared(compiled.metadata.shared, tokens)
        return reduce_partials(partials, bias, activation, x.dtype)
