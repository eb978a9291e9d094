"""Whole layers taken out of ONNX graphs, against PyTorch modules without these layers."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.cli import app as cli
from graphprune.frontends.onnx.load import load_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import run, written
from onnx_layers import layers_plan, slimmed

# Not imported by statements: mypy would follow them into the zoo, which it is to leave out.
randomise: Callable[[Any], Any] = importlib.import_module("zoo.case").randomise
convolutional = importlib.import_module("zoo.convolutional")

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
EXPORTERS = ("torchscript", "dynamo")
WIDTH, HEADS, INNER, DEPTH = 12, 3, 20, 4
INPUT = (2, 5, 6)
IMAGE = (2, 3, 16, 16)


class Attention(nn.Module):
    """Causal attention; every layer makes a mask of its own."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        heads = (batch, length, -1, WIDTH // HEADS)
        q, k, v = (p(x).view(heads).transpose(1, 2) for p in (self.q, self.k, self.v))
        places = torch.arange(length)
        mask = torch.where(places[:, None] >= places, 0.0, -1e4)
        scores = torch.softmax(q @ k.transpose(-1, -2) * 0.5 + mask, dim=-1)
        return self.out((scores @ v).transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    """Attention, then a feed-forward block, with the norms before or behind them."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def feed(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x):
        if self.first:
            x = x + self.attention(self.norm1(x))
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.feed(x))


class Transformer(nn.Module):
    """A stack of layers between two projections."""

    def __init__(self, first=False):
        super().__init__()
        self.stem = nn.Linear(INPUT[-1], WIDTH)
        self.layers = nn.ModuleList(Layer(first) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 3)

    def states(self, x):
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found

    def forward(self, x):
        return self.head(self.states(x)[-1])


class States(Transformer):
    """Returns what every layer gives, as well."""

    def forward(self, x):
        found = self.states(x)
        return self.head(found[-1]), *found[1:]


def pre_norm():
    return Transformer(first=True), INPUT


def post_norm():
    return Transformer(first=False), INPUT


def resnet():
    return convolutional.resnet_basic(), IMAGE


# Layers that go: of the ResNet, the two whose shortcut is the identity; one has to stay.
CUT = {pre_norm: (0, 2), post_norm: (1, 2), resnet: (0, 2)}
CASES = [pytest.param(b, e, id=f"{b.__name__}-{e}") for b in CUT for e in EXPORTERS]


class Exported(NamedTuple):
    module: nn.Module
    x: torch.Tensor
    file: Path


def export(module, x, file, exporter, **options) -> Exported:
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        logging.disable(logging.WARNING)
        stack.callback(logging.disable, logging.NOTSET)
        if exporter == "dynamo":
            torch.onnx.export(module, (x,), str(file), dynamo=True, verbose=False, **options)
        else:
            torch.onnx.export(
                module, (x,), str(file), dynamo=False, **{"opset_version": 17, **options}
            )
    return Exported(module, x, file)


def given(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Models with random weights and their files, each exported once."""
    known: dict[tuple[str, str], Exported] = {}

    def get(build, exporter):
        key = build.__name__, exporter
        if key not in known:
            module, shape = build()
            file = tmp_path_factory.mktemp("dense") / f"{'-'.join(key)}.onnx"
            known[key] = export(randomise(module), given(shape), file, exporter)
        return known[key]

    return get


@pytest.fixture(scope="module")
def traced():
    """The torch programs of the same models."""
    known = {}

    def get(build):
        if build not in known:
            module, shape = build()
            known[build] = gp.trace(randomise(module), (given(shape),))
        return known[build]

    return get


def without(module, gone):
    """The PyTorch module without some of its layers: nothing of graphprune in it."""
    slim = copy.deepcopy(module)
    kept = [layer for i, layer in enumerate(slim.layers) if i not in gone]
    slim.layers = type(slim.layers)(*([kept] if isinstance(slim.layers, nn.ModuleList) else kept))
    return slim


def outputs(file, x):
    (name,) = [v.name for v in onnx.load(file).graph.input]
    return run(file, **{name: x.numpy()})


def matrices(found):
    """The shapes of a graph's weights and how many there are of each."""
    kind = onnx.TensorProto.FLOAT
    return Counter(tuple(t.dims) for t in found.initializer if t.data_type == kind and any(t.dims))


def same(file, module, x):
    """Whether a file computes what a module computes."""
    with torch.no_grad():
        wanted = module(x)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for found, right in zip(outputs(file, x), wanted, strict=True):
        np.testing.assert_allclose(found, right.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("build", "exporter"), CASES)
def test_the_file_computes_what_the_module_without_these_layers_does(
    exported, tmp_path, build, exporter
):
    module, x, file = exported(build, exporter)
    program = load_onnx(file)
    slim = slimmed(program, layers_plan(program, CUT[build]), tmp_path / "slim.onnx")
    small = without(module, CUT[build])
    same(slim, small, x)
    before, after = (onnx.load(f).graph for f in (file, slim))
    assert len(after.node) < len(before.node)
    assert matrices(after) < matrices(before)
    if exporter == "torchscript":  # the other one takes seconds
        # As large as what the exporter makes of the small module.
        wanted = onnx.load(export(small, x, tmp_path / "again.onnx", exporter).file).graph
        assert len(after.node) <= len(wanted.node)
        assert matrices(after) == matrices(wanted)
    assert [v.name for v in after.input] == [v.name for v in before.input]
    assert [v.name for v in after.output] == [v.name for v in before.output]


@pytest.mark.parametrize(("build", "exporter"), CASES)
def test_the_same_layers_can_go_as_in_torch(exported, traced, build, exporter):
    here, there = load_onnx(exported(build, exporter).file), traced(build)
    (found,) = (s for s in here.structures if s.role == "layers")
    (wanted,) = (s for s in there.structures if s.role == "layers")
    assert (found.name, found.size) == (wanted.name, wanted.size)
    assert [b.index for b in found.blocks] == [b.index for b in wanted.blocks]
    if build is not resnet:  # whose norms the exporters fold into the convolutions
        assert found.params == wanted.params
    a, b = (gp.select(p, remove={"layers": 0.5}).kept_units for p in (here, there))
    assert a == b
    assert a
    a, b = (gp.select(p, shape={"layers": wanted.size - 1}).kept_units for p in (here, there))
    assert a == b
    assert len(a["layers"]) == wanted.size - 1


@pytest.mark.parametrize(("build", "exporter"), CASES)
def test_layers_together_with_widths(exported, traced, tmp_path, build, exporter):
    _, x, file = exported(build, exporter)
    remove = {"layers": 0.4, "channels": 0.5}
    if build is not resnet:
        remove = {"layers": 0.5, "ffn": 0.5, "heads": 1 / 3, "hidden": 0.25}
    program = load_onnx(file)
    slimmed(program, gp.select(program, remove, score="random", seed=3), tmp_path / "random.onnx")
    if build is resnet:
        return  # folded norms weigh in other scores
    slim = slimmed(program, gp.select(program, remove), tmp_path / "slim.onnx")
    torches = traced(build)
    same(slim, gp.apply(torches, gp.select(torches, remove)).module, x)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_budget_that_layers_take_part_in(exported, tmp_path, exporter):
    program = load_onnx(exported(pre_norm, exporter).file)
    budget = program.costs.total().params - 2 * program.by_name["layers"].params
    plan = gp.select(program, target={"params": budget}, roles=["layers", "ffn"])
    assert len(plan.kept_units["layers"]) < DEPTH
    slimmed(program, plan, tmp_path / "slim.onnx")
    assert 0.995 * budget <= SlimOnnx(program, plan).cost.params <= budget


@pytest.mark.parametrize("first", [True, False])
def test_a_state_that_the_model_returns_keeps_its_name(tmp_path, first):
    x = given(INPUT)
    module = randomise(States(first))
    file = export(module, x, tmp_path / "dense.onnx", "torchscript").file
    program = load_onnx(file)
    plan = layers_plan(program, (1, 2, 3))
    slim = slimmed(program, plan, tmp_path / "slim.onnx")
    with torch.no_grad():
        state = module.states(x)[1]
        wanted = (module.head(state), state, state, state, state)
    for found, right in zip(outputs(slim, x), wanted, strict=True):
        np.testing.assert_allclose(found, right.numpy(), rtol=1e-4, atol=1e-5)
    names = [[v.name for v in onnx.load(f).graph.output] for f in (file, slim)]
    assert names[0] == names[1]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_sizes_and_masks_that_layers_share_stay(tmp_path, exporter):
    """Equal masks are computed once, in the first layer; the last one still needs it."""
    module, x = randomise(Transformer(first=True)), given(INPUT)
    if exporter == "dynamo":
        options: dict[str, Any] = {
            "dynamic_shapes": ({0: torch.export.Dim("b"), 1: torch.export.Dim("l")},)
        }
    else:
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "b", 1: "l"}}}
    file = export(module, x, tmp_path / "dense.onnx", exporter, **options).file
    program = load_onnx(file)
    slim = slimmed(program, layers_plan(program, (0, 2)), tmp_path / "slim.onnx")
    same(slim, without(module, (0, 2)), x)
    same(slim, without(module, (0, 2)), given((3, 9, INPUT[-1])))


def test_a_norm_that_is_written_out(tmp_path):
    """Before opset 17 a layer norm is six operators."""
    module, x = randomise(Transformer(first=False)), given(INPUT)
    file = export(module, x, tmp_path / "dense.onnx", "torchscript", opset_version=14).file
    assert not any(n.op_type == "LayerNormalization" for n in onnx.load(file).graph.node)
    program = load_onnx(file)
    slim = slimmed(program, layers_plan(program, (0, 3)), tmp_path / "slim.onnx")
    same(slim, without(module, (0, 3)), x)


@pytest.mark.parametrize(("build", "exporter"), CASES[:4])
def test_layers_without_names(exported, tmp_path, build, exporter):
    module, x, file = exported(build, exporter)
    model = onnx.load(file)
    for node in model.graph.node:
        node.name = ""
        del node.metadata_props[:]
    program = load_onnx(written(model, tmp_path))
    assert program.by_name["stack0"].size == DEPTH
    slim = slimmed(program, layers_plan(program, (0, 2), "stack0"), tmp_path / "slim.onnx")
    same(slim, without(module, (0, 2)), x)
    assert load_onnx(slim).by_name["stack0"].size == DEPTH - 2


@pytest.mark.parametrize(("build", "exporter"), CASES[:4])
def test_layers_of_a_slim_file_are_numbered_anew(exported, tmp_path, build, exporter):
    module, x, file = exported(build, exporter)
    dense = load_onnx(file)
    once = load_onnx(slimmed(dense, layers_plan(dense, (0, 2)), tmp_path / "once.onnx"))
    (stack,) = (s for s in once.structures if s.role == "layers")
    assert (stack.name, stack.size) == ("layers", 2)
    assert [b.index for b in stack.blocks] == [0, 1]
    twice = slimmed(once, layers_plan(once, (0,)), tmp_path / "twice.onnx")
    same(twice, without(module, (0, 1, 2)), x)


def test_command_line(exported, tmp_path, capsys):
    module, x, file = exported(post_norm, "torchscript")
    out = tmp_path / "slim.onnx"

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        return int(caught.value.code or 0), capsys.readouterr().out

    assert call("compile", file, "-o", out, "--remove", "layers=0.5")[0] == 0
    assert call("verify", out)[0] == 0
    program = load_onnx(file)
    kept = gp.select(program, remove={"layers": 0.5}).kept_units["layers"]
    same(out, without(module, set(range(DEPTH)) - set(kept)), x)
    code, text = call("inspect", file, "--why", "layers.1.norm1.weight")
    assert code == 0
    assert "leaves with layer 1 of layers" in text
