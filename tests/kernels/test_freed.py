"""New tensors go where others were, and never where somebody can still look."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.kernels.freed import FreedMemory

COUNT = 1 << 19  # two MiB of float32


def within(tensor: torch.Tensor, begin: int, size: int) -> bool:
    return begin <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= begin + size


def test_memory_is_handed_out_from_its_beginning_to_its_end() -> None:
    freed = FreedMemory()
    assert freed.empty((3,), torch.float32) is None
    old = torch.zeros(COUNT)
    begin, size = old.data_ptr(), old.nbytes
    memory = old.untyped_storage()
    del old
    freed.offer(memory)
    del memory
    made = [freed.empty((100, 1001), dtype) for dtype in (torch.float32, torch.bfloat16)]
    made.append(freed.empty((3,), torch.float64))
    for i, tensor in enumerate(made):
        assert tensor is not None
        assert within(tensor, begin, size)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.fill_(i)
    assert [float(t.double().mean()) for t in made if t is not None] == [0, 1, 2]
    assert freed.empty((COUNT,), torch.float32) is None
    assert freed.empty((0, 5), torch.float32) is None
    left = freed.empty((COUNT // 2,), torch.float32)
    assert left is not None
    assert within(left, begin, size)


def a_tensor() -> tuple[torch.Tensor, object]:
    old = torch.zeros(COUNT)
    return old, old


def a_view() -> tuple[torch.Tensor, object]:
    old = torch.zeros(COUNT)
    return old, old[5:9]


def an_array() -> tuple[torch.Tensor, object]:
    old = torch.zeros(COUNT)
    return old, old.numpy()


def memory_of_numpy() -> tuple[torch.Tensor, object]:
    array = np.zeros(COUNT, np.float32)
    return torch.from_numpy(array), array


def shared_memory() -> tuple[torch.Tensor, object]:
    return torch.zeros(COUNT).share_memory_(), None


def a_gradient() -> tuple[torch.Tensor, object]:
    """The graph of a product keeps what it was made of."""
    old = torch.zeros(COUNT)
    return old, old * torch.ones(COUNT, requires_grad=True)


@pytest.mark.parametrize(
    "make", [a_tensor, a_view, an_array, memory_of_numpy, shared_memory, a_gradient]
)
def test_what_somebody_can_see_is_left_alone(
    make: Callable[[], tuple[torch.Tensor, object]],
) -> None:
    old, _seen = make()
    memory = old.untyped_storage()
    del old
    freed = FreedMemory()
    freed.offer(memory)
    assert freed.empty((3,), torch.float32) is None


class Blocks(nn.Module):
    """Weights of two MiB, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(512, 1024) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(1024, 512) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


@pytest.mark.parametrize("held", [False, True])
def test_a_model_that_is_taken_apart_leaves_its_memory_to_the_slim_one(held: bool) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):  # so that nothing of what export remembers has seen the weights
        model, example = Blocks().eval(), torch.empty(2, 512)
    weights = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    places = {n: (t.data_ptr(), t.nbytes) for n, t in weights.items()}
    copies = {n: t.clone() for n, t in weights.items()}
    state = dict(weights) if held else {}
    program = gp.trace(model, (example,), weights=weights)
    plan = gp.select(program, remove={"ffn": 0.75})
    kept = plan.kept(program)
    slim = gp.apply(program, plan, consume=True)
    reused = 0
    for name, whole in copies.items():
        cut = slim.weights[name]
        np.testing.assert_array_equal(cut.numpy(), whole.numpy()[np.ix_(*kept[name])])
        if cut.dim() == 2:
            reused += any(within(cut, *place) for place in places.values())
    assert reused == (0 if held else 5)  # the first one comes before there is any
    for name, tensor in state.items():
        assert torch.equal(tensor, copies[name])
