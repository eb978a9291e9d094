"""The arithmetic of the strip kernel, followed in NumPy, and the kernel itself on GPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.kernels.formats import reference
from graphprune.kernels.formats.strip import Strip, conflicts
from graphprune.kernels.gpu import gluon_api

if not gluon_api.AVAILABLE:
    pytest.skip(gluon_api.REASON, allow_module_level=True)

from graphprune.kernels.gpu import strip_gluon
from kernels.strip_model import elements, partial_sums, reduce, scatter_group, swizzled


def weight_of(rows: int, columns: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, at most `slots` in a strip, some strips empty and some full."""
    score = torch.rand(rows, -(-columns // 256) * 256).unflatten(1, (-1, 256))
    kept = score.argsort(2).argsort(2) < torch.randint(0, slots + 1, (*score.shape[:2], 1))
    kept[0], kept[-1, -1] = score[0].argsort(1).argsort(1) < slots, False
    numbers = torch.randint(1, 5, kept.shape) * (torch.randint(0, 2, kept.shape) * 2 - 1)
    return (numbers * kept).flatten(1)[:, :columns].to(dtype)


@pytest.mark.parametrize(
    ("rows", "columns", "slots", "tokens", "splits"),
    [
        (64, 256, 128, 8, 1),
        (64, 256, 16, 1, 1),
        (65, 257, 112, 3, 2),
        (1, 37, 48, 1, 1),
        (200, 700, 96, 17, 3),
        (130, 1500, 80, 9, 4),
        (70, 520, 256, 5, 2),
        (64, 300, 240, 70, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_is_exact(rows, columns, slots, tokens, splits, dtype):
    torch.manual_seed(rows + slots)
    weight = weight_of(rows, columns, slots, dtype)
    packed = Strip.pack(weight, slots)
    x = torch.randint(-4, 5, (tokens, columns)).to(dtype)
    block = min(64, max(8, 1 << (tokens - 1).bit_length()))
    partials = partial_sums(x, packed, splits, block)
    assert not np.isnan(partials).any()
    exact = x.double() @ weight.double().T
    assert torch.equal(torch.from_numpy(reduce(partials)).double(), exact)
    if splits > 1:
        assert np.abs(partials).sum(axis=(1, 2)).min() > 0


def test_model_of_random_numbers():
    torch.manual_seed(0)
    weight = torch.randn(70, 600).where(torch.rand(70, 600) < 0.4, 0).bfloat16()
    packed, x = Strip.pack(weight), torch.randn(4, 600).bfloat16()
    y = torch.from_numpy(reduce(partial_sums(x, packed, 2, 8))).double()
    exact = reference.linear(x, packed, None, "none", torch.float64)
    assert (y - exact).abs().max() < 1e-5 * float((x.abs().float() @ weight.abs().float().T).max())


def test_a_value_is_scattered_to_its_column():
    for row in range(64):
        column = (row * 37 + 5) % 256
        weight = torch.zeros(64, 256, dtype=torch.float16)
        weight[row, column] = 2.5
        packed = Strip.pack(weight)
        tile = np.zeros(64 * 256, dtype=np.uint16)
        words = packed.values.flatten().view(torch.int32).numpy().view(np.uint32)
        places = packed.places.flatten().view(torch.int32).numpy().view(np.uint32)
        scatter_group(tile, words.reshape(64, 8), places.reshape(64, 4))
        dense = tile[swizzled()].view(np.float16)
        assert dense[row, column] == 2.5
        assert np.count_nonzero(dense) == 1


@pytest.mark.parametrize("chunks", range(1, 17))
def test_groups_cover_the_chunks(chunks: int):
    groups = range(strip_gluon.group_count(chunks))
    covered: list[int] = []
    for g in groups:
        start, size = strip_gluon.group_start(chunks, g), strip_gluon.group_size(chunks, g)
        assert size & (size - 1) == 0
        covered += range(start, start + size)
    assert covered == list(range(chunks))


@pytest.mark.parametrize("slots", [16, 64, 128])
def test_banks(slots: int):
    """The layout writes what `strip.conflicts` counts, so its order of slots helps this kernel."""
    torch.manual_seed(slots)
    packed = Strip.pack(weight_of(64, 256, slots, torch.float16), slots)
    places = packed.places[0, 0].transpose(0, 1).flatten(1).numpy().astype(int)  # [64, slots]
    own = elements(strip_gluon.word_layout(16, slots // 16))  # [warp, lane, register, 2]
    row, slot = np.moveaxis(own, -1, 0)
    word = (row * 256 + places[row, slot]) // 2
    turns = []
    for lanes in np.moveaxis(word, 1, 2).reshape(-1, 32):
        banks = np.unique(lanes) % 32
        turns.append(np.bincount(banks).max())
    assert np.mean(turns) == pytest.approx(conflicts(packed))


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
def test_token_layout(tokens: int):
    """Every element is somebody's, and eight threads that store together meet in no bank."""
    own = elements(strip_gluon.token_layout(tokens))
    row, column = np.moveaxis(own, -1, 0)  # [warp, lane, register]
    assert len(np.unique(row * 256 + column)) == own[..., 0].size == tokens * 256
    piece = swizzled()[row, column][..., ::8] // 8  # of 16 bytes, of which 8 lie in all banks
    assert (np.diff(column.reshape(4, 32, -1, 8), axis=3) == 1).all()
    for eight in np.moveaxis(piece, 1, 2).reshape(-1, 8):
        assert len(np.unique(eight % 8)) == 8


def test_threads_read_whole_vectors():
    """A thread's words of a chunk lie next to each other; those of a warp leave no gaps."""
    for width, each in ((8, 4), (4, 2)):
        own = elements(strip_gluon.word_layout(width, 2))
        row, place = np.moveaxis(own, -1, 0)
        offset = strip_gluon.word_offset.fn(row, place, width)
        vectors = offset.reshape(4, 32, 2, each)
        assert (np.diff(vectors, axis=3) == 1).all()
        assert (vectors[..., 0] % each == 0).all()
        for warp in range(4):
            chunk = np.sort(vectors[warp, :, 0].flatten())
            assert (np.diff(chunk) == 1).all()


def test_choose_splits():
    def choose(down: int, across: int, tokens: int) -> int:
        return strip_gluon.choose_splits(down, across, tokens, 132)

    assert choose(64, 16, 8) == 8  # 512 of 528 blocks
    assert choose(64, 16, 32) == 4
    assert choose(448, 16, 8) == 1
    assert choose(1, 3, 1) == 3
    assert choose(64, 10, 8) == 5  # eight take two rounds, too
    for down in (1, 7, 64, 100, 600):
        for across in (1, 5, 16, 56):
            for tokens in (1, 16, 64, 100):
                splits = choose(down, across, tokens)
                assert 1 <= splits <= across
                bounds = [strip_gluon.split_begin.fn(s, across, splits) for s in range(splits + 1)]
                assert (bounds[0], bounds[-1]) == (0, across)
                assert np.diff(bounds).min() > 0
                assert np.diff(bounds).max() == -(-across // splits)


def test_operands_that_do_not_fit():
    packed = Strip.pack(torch.ones(4, 300).half(), 256)
    x = torch.ones(2, 300).half()
    right = {"x": x, "values": packed.values, "places": packed.places, "shape": (4, 300)}
    for wrong, why in (
        ({}, "x is on cpu, not on a GPU"),
        ({"x": x[:, :200]}, r"shape \[2, 200\] instead of \[tokens, 300\]"),
        ({"x": x.bfloat16()}, "x is torch.bfloat16, the weight torch.float16"),
        ({"x": x.float(), "values": packed.values.float()}, r"torch\.float32 isn't one of"),
        ({"places": packed.places[:, :1]}, "places of shape"),
        ({"values": packed.values.flatten()}, "values of shape"),
        ({"activation": "tanh"}, "activation 'tanh' isn't one of"),
        ({"bias": torch.ones(3)}, r"bias has the shape \[3\]"),
    ):
        with pytest.raises(ValueError, match=why):
            strip_gluon.strip_linear(**{**right, **wrong})


def test_tokens_are_aligned():
    x = torch.randn(3, 320).half()
    assert strip_gluon.aligned(x) is x
    for part in (x[:, 1:49], x[:, :300], torch.randn(3, 37).half(), x[:, :320].T[:16].T):
        copy = strip_gluon.aligned(part)
        assert copy.data_ptr() % 16 == 0
        assert copy.stride(0) % 16 == 0
        assert torch.equal(copy, part)


def test_shared_memory_that_the_compiler_lays_out_otherwise():
    strip_gluon.check_shared(strip_gluon.shared_bytes(16), 16)
    with pytest.raises(RuntimeError, match=r"strip_kernel for 16 tokens has 99999 bytes"):
        strip_gluon.check_shared(99999, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slots", [16, 64, 96, 112, 128, 256])
@pytest.mark.parametrize("shape", [(1, 37), (64, 256), (300, 1000), (1024, 2048)])
def test_on_gpu(dtype: torch.dtype, slots: int, shape: tuple[int, int]):
    torch.manual_seed(0)
    weight = weight_of(*shape, slots, dtype) * torch.rand(shape).to(dtype)
    packed = Strip.pack(weight.cuda(), slots)
    bias = torch.randn(shape[0]).cuda()
    for tokens in (1, 8, 17, 64, 100):
        x = torch.randn(tokens, shape[1]).to(dtype).cuda()
        exact = reference.linear(x, packed, bias, "gelu", torch.float64)
        terms = x.double().abs() @ packed.unpack().double().abs().T + bias.double().abs()
        allowed = exact.abs() * torch.finfo(dtype).eps + terms * 1e-5
        for splits in (None, 1, packed.values.shape[1]):
            y, again = (
                strip_gluon.strip_linear(
                    x, packed.values, packed.places, shape, bias, "gelu", splits=splits
                )
                for _ in range(2)
            )
            assert ((y.double() - exact).abs() <= allowed).all()
            assert torch.equal(y, again)
