"""Ordinary ``.pt2`` files open without trust, whatever is in the program."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphprune as gp
from graphprune.frontends.pt2.check import check_pt2

AUTO = torch.export.Dim.AUTO
Pair = namedtuple("Pair", "first second")
pytree._register_namedtuple(Pair, serialized_type_name="tests.frontends.Pair")


@torch.library.custom_op("graphprune_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Function(nn.Module):
    """A module that calls a function with a linear layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.layer, *args, **kwargs)


class Stored(nn.Module):
    """Everything that a program can store of tensors."""

    mask: Tensor
    hidden: Tensor
    empty: Tensor
    scalar: Tensor
    angles: Tensor
    narrow: Tensor
    brain: Tensor
    whole: Tensor
    flag: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.odd = nn.ParameterDict({"a-b c": nn.Parameter(torch.ones(4))})
        self.turned = nn.Parameter(torch.randn(4, 6).T[:4])
        self.register_buffer("mask", torch.ones(1, 1).expand(3, 4))
        self.register_buffer("hidden", torch.ones(4), persistent=False)
        self.register_buffer("empty", torch.ones(0, 4))
        self.register_buffer("scalar", torch.tensor(2.0))
        self.register_buffer("angles", torch.polar(torch.ones(4), torch.ones(4)))
        self.register_buffer("narrow", torch.ones(4).to(torch.float8_e4m3fn))
        self.register_buffer("brain", torch.ones(4).to(torch.bfloat16))
        self.register_buffer("whole", torch.ones(4, dtype=torch.int8))
        self.register_buffer("flag", torch.tensor([True]))
        self.constant = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.first(x)) * self.odd["a-b c"] @ self.turned
        x = x + self.mask + self.hidden + self.empty.sum() + self.scalar + self.constant
        x = x + (x * self.angles).abs() + self.narrow.float() + self.brain + self.whole
        return torch.where(self.flag, x, x + torch.tensor([1.0, 2.0, 3.0, 4.0]))


def sizes(layer: nn.Module, x: Tensor) -> Any:
    n = x.shape[0]
    wide = nn.functional.interpolate(x[None], scale_factor=1.7)
    pooled = nn.functional.avg_pool1d(x.T[None], 3, 2)
    return (
        layer(x)[: max(1, n // 2)], x.repeat(n % 3 + 1, 1), x[: 2 * min(n, 7)], wide, pooled,
        torch.arange(0, n, 3), torch.zeros(int(n * 0.3) + 2), torch.zeros(int(n**0.5) + 1),
        torch.zeros(n**2), x.reshape(-1).unfold(0, 2, 1), torch.cat([x, x])[1::2],
    )  # fmt: skip


def data(layer: nn.Module, x: Tensor) -> Any:
    count: Any = x.abs().sum().int().item()
    torch._check(count >= 2)
    torch._check(count < 1000)
    return torch.zeros(count), torch.ones(count * 2).view(2, -1), x.nonzero(), layer(x)


def control(layer: nn.Module, x: Tensor) -> Any:
    def more(i: Tensor, y: Tensor) -> Tensor:
        return i < 3

    def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, y.cos()

    looped = torch._higher_order_ops.while_loop(more, step, (torch.tensor(0), x))
    return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (layer(x),)), looped


def switched(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x) + y


def text(layer: nn.Module, x: Tensor, mode: str = "", factor: float = 1.0, flag: Any = None) -> Any:
    assert flag is None
    return torch.einsum("ij,ij->i", layer(x), x) * factor, nn.functional.gelu(x, approximate=mode)


def nested(layer: nn.Module, x: Tensor, *, pair: Any, parts: Mapping[str, Any]) -> Any:
    y = layer(x) + pair[0] * pair[1] + parts["a"][0]
    found = defaultdict(list, {"z": [y]})
    return {"out": OrderedDict(y=y), "pair": Pair(y, x), "many": [y, (x, None)], "found": found}


def batched(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: layer(row).softmax(0))(x)


ROWS = ({0: AUTO},)
X = torch.arange(48.0).view(12, 4) / 48
KINDS: Mapping[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = {
    "stored": (Stored(), (X[:3],), {}, None),
    "sizes": (Function(sizes), (X,), {}, {"args": ROWS}),
    "data": (Function(data), (X,), {}, None),
    "control": (Function(control), (X,), {}, None),
    "switched": (Function(switched), (X,), {}, None),
    "text": (Function(text), (X,), {"mode": "tanh", "factor": 2.0, "flag": None}, None),
    "batched": (Function(batched), (X,), {}, None),
    "nested": (Function(nested), (X,), {"pair": (X, torch.ones(1)), "parts": {"a": [X]}}, None),
    "custom": (Function(lambda layer, x: doubled(layer(x))), (X,), {}, None),
    "lstm": (nn.LSTM(4, 3, bidirectional=True), (X[:, None],), {}, None),
    "attention": (nn.MultiheadAttention(4, 2), (X, X, X), {}, None),
    "convolution": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        (torch.ones(2, 3, 9, 9),), {}, ({0: AUTO, 2: AUTO, 3: AUTO},),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_export_saves_opens(kind: str, tmp_path: Path) -> None:
    module, args, kwargs, shapes = KINDS[kind]
    exported = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "model.pt2", extra_files={"note/a.txt": "import os"})
    check_pt2(tmp_path / "model.pt2")
    torch.export.save(exported.run_decompositions(), tmp_path / "core.pt2")
    check_pt2(tmp_path / "core.pt2")


def test_inputs_of_a_class_of_ones_own_need_trust(tmp_path: Path) -> None:
    """They are pickled, and a pickle imports what it likes."""
    inputs = {"pair": Pair(X, torch.ones(1)), "parts": {"a": [X]}}
    exported = torch.export.export(Function(nested), (X,), inputs)
    torch.export.save(exported, tmp_path / "model.pt2")
    with pytest.raises(gp.LoadError) as refused:
        gp.load(tmp_path / "model.pt2")
    assert "the example inputs are more than tensors" in str(refused.value)
    assert "--trust" in str(refused.value)


def test_what_we_write_opens(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    program = gp.trace(module, (X,))
    slim = gp.apply(program, gp.select(program, remove={"*": 0.5}))
    slim.save(tmp_path / "slim.pt2", format="pt2")
    found = gp.load(tmp_path / "slim.pt2")
    assert isinstance(found, gp.Program)
    torch.testing.assert_close(found.exported.module()(X), slim.module(X))
