"""Weights in huge pages are the same weights."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from graphprune.kernels import huge_pages
from graphprune.kernels.huge_pages import Arena, settle
from graphprune.kernels.linear import SparseLinear

needed = pytest.mark.skipif(
    not huge_pages.available(), reason="this system has no huge pages to ask for"
)


@needed
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]
)
def test_a_copy_with_memory_of_its_own(dtype):
    arena, kept = Arena(), []
    for count in (1, 7, 1000, 3 << 18):
        x = torch.randint(0, 2, (count, 3)).to(dtype)
        placed = arena.place(x)
        assert placed.dtype == dtype
        assert torch.equal(placed, x)
        assert placed.data_ptr() != x.data_ptr()
        assert placed.data_ptr() % 64 == 0
        assert placed.untyped_storage().nbytes() == x.nbytes
        kept.append((x, placed))
    del arena
    gc.collect()
    for x, placed in kept:  # a chunk lives as long as what is in it
        assert torch.equal(placed, x)
        placed.zero_()
    assert all(not placed.any() for _, placed in kept)


@needed
def test_chunks_are_followed_by_others(monkeypatch):
    monkeypatch.setattr(huge_pages, "CHUNK", 1 << 20)
    arena = Arena()
    tensors = [torch.randn(n) for n in (1 << 17, 1 << 17, 1 << 20, 5, 1 << 19)]
    placed = [arena.place(t) for t in tensors]
    assert all(torch.equal(p, t) for p, t in zip(placed, tensors, strict=True))
    ends = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in placed)
    assert all(a[1] <= b[0] for a, b in pairwise(ends))


def test_what_stays(monkeypatch):
    arena = Arena()
    for x in (torch.empty(0), torch.ones(3, 4).T, torch.ones(3, device="meta")):
        assert arena.place(x) is x
    monkeypatch.setattr(huge_pages, "available", lambda: False)
    x = torch.ones(5)
    assert arena.place(x) is x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        dense = nn.Linear(16, 16)
        dense.weight.data[::2] = 0
        self.sparse = SparseLinear.of_linear(dense, "bitmap")
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mean", self.norm.running_mean)

    def forward(self, x):
        return self.head(self.norm(self.sparse(self.embedding(x)) + self.mean))


@needed
def test_what_is_moved_is_let_go_of(monkeypatch):
    """One tensor at a time, buffers as well as parameters."""
    model = nn.Sequential(*(Model() for _ in range(3)))
    buffers = {id(b): b for b in model.buffers()}
    alive = [weakref.ref(b) for b in {b.data_ptr(): b for b in buffers.values()}.values()]
    del buffers
    left = []
    place = Arena.place

    def counted(self, x):
        left.append(sum(r() is not None for r in alive))
        return place(self, x)

    monkeypatch.setattr(Arena, "place", counted)
    settle(model)
    buffered = len(list(model.buffers()))
    assert left[-buffered:] == sorted(left[-buffered:], reverse=True)
    assert left[-1] < left[0] - buffered // 2


@needed
def test_tensors_that_share_memory_stay():
    model = nn.Module()
    whole = torch.randn(8, 8)
    model.register_parameter("whole", nn.Parameter(whole))
    model.register_parameter("part", nn.Parameter(whole[2]))
    model.register_buffer("same", whole.view(64))
    model.register_buffer("few", torch.randint(0, 2, (4, 4)).to_sparse())
    model.register_buffer("integers", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    model.register_buffer("wanted", torch.ones(3, requires_grad=True))
    with torch.inference_mode():
        settle(model)
    assert model.whole.data_ptr() == model.same.data_ptr() == whole.data_ptr()
    assert model.part.data_ptr() == whole[2].data_ptr()
    assert model.wanted.requires_grad
    model.register_buffer("counted", torch.zeros(3))
    with torch.inference_mode():
        settle(model)
    model.counted.add_(1)


@needed
def test_a_model_computes_the_same():
    torch.manual_seed(0)
    model = Model().eval()
    x = torch.tensor([1, 5, 9])
    before, names = model(x), {n: t.clone() for n, t in model.state_dict().items()}
    places = {n: t.data_ptr() for n, t in model.state_dict().items()}
    settle(model)
    assert torch.equal(model(x), before)
    assert model.head.weight is model.embedding.weight
    assert model.mean is model.norm.running_mean
    after = model.state_dict()
    assert list(after) == list(names)
    assert all(torch.equal(after[n], t) for n, t in names.items())
    assert all(t.data_ptr() != places[n] for n, t in after.items())
    file = io.BytesIO()
    torch.save(after, file)
    assert len(file.getvalue()) < 20_000  # and not a chunk
    twin = copy.deepcopy(model)
    model.embedding.weight.data.zero_()
    assert torch.equal(twin(x), before)
