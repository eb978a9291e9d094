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
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune import cli
from graphprune.analysis.onnx_scopes import module_path, rename_modules
from graphprune.analysis.repeats import _repetition
from graphprune.onnx_program import SlimOnnx, load_onnx
from graphprune.rewrite.renumber import shifted
from graphprune.verification_onnx import verify_onnx
from onnx_graphs import graph, run, weights, written

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


def layers_plan(program, gone, stack="layers"):
    size = program.by_name[stack].size
    kept = tuple(i for i in range(size) if i not in gone)
    return gp.Plan(program.fingerprint, {stack: kept}, {stack: size})


def slimmed(program, plan, file):
    """The slim file, which the masked model, the checker and the plan's figures agree with."""
    slim = SlimOnnx(program, plan)
    slim.save(file)
    certificate = verify_onnx(program, plan, file)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 1e-3
    onnx.checker.check_model(str(file), full_check=True)
    left = {t.name: int(np.prod(t.dims)) for t in onnx.load(file).graph.initializer}
    assert sum(n for name, n in left.items() if name in program.trainable) == slim.cost.params
    return file


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


def caching():
    """Two residual blocks; each returns what it has computed inside, too."""
    arrays = {n: weights(4, 4, seed=i) for i, n in enumerate("abcd")}
    return graph(
        """g (float[2, 4] x) => (float[2, 4] y, float[2, 4] present0, float[2, 4] present1) {
            present0 = MatMul(x, a)
            f0 = Relu(present0)
            g0 = MatMul(f0, b)
            h = Add(x, g0)
            present1 = MatMul(h, c)
            f1 = Relu(present1)
            g1 = MatMul(f1, d)
            y = Add(h, g1)
        }""",
        **arrays,
    )


def test_a_layer_whose_inside_the_model_returns_stays(tmp_path):
    model = caching()
    for i, node in enumerate(model.graph.node):
        node.name = f"/layers.{i // 4}/{node.op_type}"
    program = load_onnx(written(model, tmp_path))
    assert not program.stacks()
    assert program.fixed_layers() == {
        "layers.0": "the model returns present0 of it",
        "layers.1": "the model returns present1, y of it",
    }
    with pytest.raises(gp.GraphPruneError, match="present0"):
        gp.select(program, remove={"layers": 0.5})


def test_what_only_removed_layers_share_leaves_with_the_last_of_them(tmp_path):
    """One bias for two layers of three: an exporter merges what is equal."""
    model = graph(
        """g (float[2, 4] x) => (float[2, 4] y) {
            f0 = MatMul(x, a)
            g0 = Add(f0, bias)
            h0 = Add(x, g0)
            f1 = MatMul(h0, b)
            g1 = Add(f1, bias)
            h1 = Add(h0, g1)
            f2 = MatMul(h1, c)
            g2 = Add(f2, other)
            y = Add(h1, g2)
        }""",
        a=weights(4, 4), b=weights(4, 4, seed=1), c=weights(4, 4, seed=2),
        bias=weights(4), other=weights(4, seed=1),
    )  # fmt: skip
    program = load_onnx(written(model, tmp_path))
    for gone, names, params in (
        ((0,), {"b", "c", "bias", "other"}, 40),
        ((0, 1), {"c", "other"}, 20),
        ((1, 2), {"a", "bias"}, 20),
    ):
        plan = layers_plan(program, gone, "stack0")
        slim = slimmed(program, plan, tmp_path / "slim.onnx")
        assert {t.name for t in onnx.load(slim).graph.initializer} == names
        assert SlimOnnx(program, plan).cost.params == params
        kept = {n for n, (rows, *_) in plan.kept(program).items() if len(rows)}
        assert kept == names


def test_what_others_read_of_a_removed_layer_stays(tmp_path):
    """A mask that the first layer makes for all of them, under names of an exporter."""
    model = graph(
        """g (float[2, 4] x, float[2, 4] m) => (float[2, 4] y) {
            mask = Relu(m)
            f0 = MatMul(x, a)
            g0 = Mul(f0, mask)
            h0 = Add(x, g0)
            f1 = MatMul(h0, b)
            k1 = Relu(f1)
            g1 = Mul(k1, mask)
            h1 = Add(h0, g1)
            f2 = MatMul(h1, c)
            g2 = Mul(f2, mask)
            y = Add(h1, g2)
        }""",
        a=weights(4, 4), b=weights(4, 4, seed=1), c=weights(4, 4, seed=2),
    )  # fmt: skip
    for node, layer in zip(model.graph.node, (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2), strict=True):
        node.name = f"/layers.{layer}/{node.op_type}"
    program = load_onnx(written(model, tmp_path))
    slim = slimmed(program, layers_plan(program, (0,)), tmp_path / "slim.onnx")
    x, m = weights(2, 4, seed=3), weights(2, 4, seed=4)
    mask = np.maximum(m, 0)
    h = x + np.maximum(x @ weights(4, 4, seed=1), 0) * mask
    y = h + (h @ weights(4, 4, seed=2)) * mask
    np.testing.assert_allclose(run(slim, x=x, m=m)[0], y, rtol=1e-4, atol=1e-5)
    names = [node.name for node in onnx.load(slim).graph.node]
    assert len(set(names)) == len(names)
    again = load_onnx(slim).by_name["layers"]
    assert (again.size, [b.index for b in again.blocks]) == (2, [0, 1])


@pytest.mark.parametrize("named", [True, False])
def test_a_fused_norm_adds_and_ends_a_layer(tmp_path, named):
    """ONNX Runtime's optimiser drops the names of what it fuses."""
    model = graph(
        """g (float[2, 4] x) => (float[2, 4] y) {
            k0 = Identity(x)
            f0 = MatMul(k0, a)
            h0 = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (x, f0, s, o)
            k1 = Identity(h0)
            f1 = MatMul(k1, b)
            h1 = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (h0, f1, s, o)
            k2 = Identity(h1)
            f2 = MatMul(k2, c)
            y = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (h1, f2, s, o)
        }""",
        a=weights(4, 4), b=weights(4, 4, seed=1), c=weights(4, 4, seed=2),
        s=weights(4) + 2, o=weights(4, seed=1),
    )  # fmt: skip
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    for i, node in enumerate(n for n in model.graph.node if n.op_type == "MatMul" and named):
        node.name = f"/layers.{i}/MatMul"
    program = load_onnx(written(model, tmp_path))
    plan = layers_plan(program, (0, 1), "layers" if named else "stack0")
    slim = slimmed(program, plan, tmp_path / "slim.onnx")
    assert [n.op_type for n in onnx.load(slim).graph.node] == [
        "Identity",
        "MatMul",
        "SkipLayerNormalization",
    ]
    x = weights(2, 4, seed=3).astype(np.float64)
    total = x + x @ weights(4, 4, seed=2)
    centred = total - total.mean(axis=1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    wanted = scaled * (weights(4) + 2) + weights(4, seed=1)
    np.testing.assert_allclose(run(slim, x=x.astype(np.float32))[0], wanted, rtol=1e-4, atol=1e-4)


def test_what_adds_nothing_or_widens_is_no_layer(tmp_path):
    """Norms and plain products that repeat; a sum of two values that aren't the input."""
    model = graph(
        """g (float[2, 4] x) => (float[2, 4] y) {
            n0 = LayerNormalization(x, s)
            n1 = LayerNormalization(n0, s)
            p0 = MatMul(n1, a)
            q0 = MatMul(n1, b)
            z0 = Add(p0, q0)
            p1 = MatMul(z0, a)
            q1 = MatMul(z0, b)
            y = Add(p1, q1)
        }""",
        s=weights(4), a=weights(4, 4), b=weights(4, 4, seed=1),
    )  # fmt: skip
    assert not load_onnx(written(model, tmp_path)).stacks()
    for node, path in zip(model.graph.node, (0, 1, 2, 2, 2, 3, 3, 3), strict=True):
        node.name = f"/layers.{path}/{node.op_type}"
    assert not load_onnx(written(model, tmp_path)).stacks()


def test_copies_between_layers_without_names(tmp_path):
    model = graph(
        """g (float[2, 4] x) => (float[2, 4] y) {
            f0 = MatMul(x, a)
            h0 = Add(x, f0)
            i0 = Identity(h0)
            c0 = Cast <to = 1> (i0)
            f1 = MatMul(i0, b)
            h1 = Add(c0, f1)
            f2 = MatMul(h1, c)
            y = Add(h1, f2)
        }""",
        a=weights(4, 4), b=weights(4, 4, seed=1), c=weights(4, 4, seed=2),
    )  # fmt: skip
    program = load_onnx(written(model, tmp_path))
    assert [b.index for b in program.by_name["stack0"].blocks] == [0, 1, 2]
    slim = slimmed(program, layers_plan(program, (0, 2), "stack0"), tmp_path / "slim.onnx")
    x = weights(2, 4, seed=3)
    wanted = x + x @ weights(4, 4, seed=1)
    np.testing.assert_allclose(run(slim, x=x)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("AAAA", (0, 1, 4)),
        ("ABABAB", (0, 2, 3)),
        ("XABABAB", (1, 2, 3)),
        ("AABAAB", (0, 3, 2)),
        ("ABABABC", (0, 2, 3)),
        ("AABB", (0, 1, 2)),
        ("ABC", (0, 1, 1)),
        ("ABABA", (0, 2, 2)),
        ("", (0, 1, 1)),
    ],
)
def test_repetition(kinds, expected):
    assert _repetition(kinds) == expected


@pytest.mark.parametrize(
    ("name", "scopes", "path", "moved"),
    [
        ("/encoder/layer.3/output/Add", "", "encoder.layer.3.output", "encoder/layer.2/output"),
        ("/layers/layers.3/conv/Conv", "", "layers.3.conv", "layers/layers.2/conv"),
        ("/layers/layers.3/layers.3.0/Conv", "", "layers.3.0", "layers/layers.2/layers.2.0"),
        ("/layers.3_1/Add", "", "layers.3", "layers.2_1"),
        ("/layers.0/Add", "", "layers.0", "layers.0"),
        ("/Add", "", "", ""),
        ("Add_7", "", None, None),
        ("n", "['', 'layers', 'layers.3', 'add']", "layers.3", "['', 'layers', 'layers.2', 'add']"),
        ("n", "['', 'layers.3.norm@1', 'mul']", "layers.3.norm", "['', 'layers.2.norm@1', 'mul']"),
        ("n", "no list", None, None),
    ],
)
def test_module_paths(name, scopes, path, moved):
    node = ir.node("Add", [ir.val("x"), ir.val("y")], name=name)
    if scopes:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    assert module_path(node) == path
    shifts = {s: {0: 0, 3: 2} for s in ("layers", "encoder.layer")}
    rename_modules(node, lambda p: shifted(p, shifts))
    if moved is None:
        assert node.name == name
    elif scopes:
        assert node.metadata_props["pkg.torch.onnx.name_scopes"] == moved
    else:
        assert node.name == "/".join(["", *([moved] if moved else []), name.rpartition("/")[2]])


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
