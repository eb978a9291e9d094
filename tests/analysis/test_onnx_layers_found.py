"""Which layers of ONNX graphs can go, and what goes with them, worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphprune as gp
from graphprune.analysis.blocks import Flow
from graphprune.analysis.repeats import repeated_paths
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx.scopes import module_path, rename_modules
from graphprune.rewrite.renumber import shifted
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, run, weights, written
from onnx_layers import layers_plan, slimmed


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
    """One table for two layers of three: an exporter merges what is equal."""
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
        bias=weights(2, 4), other=weights(4, seed=1),
    )  # fmt: skip
    program = load_onnx(written(model, tmp_path))
    for gone, names, params in (
        ((0,), {"b", "c", "bias", "other"}, 44),
        ((0, 1), {"c", "other"}, 20),
        ((1, 2), {"a", "bias"}, 24),
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
    ("kinds", "layers"),
    [
        ("AAAA", "0123"),
        ("ABABAB", "001122"),
        ("XABABAB", " 001122"),
        ("AABAAB", "000111"),
        ("ABABABC", "001122 "),
        ("AABB", "01  "),
        ("ABC", "   "),
        ("ABABA", "0011 "),
        ("", ""),
    ],
)
def test_repetition(kinds, layers):
    """Residual blocks of one operator each: the layer of each, where there is one."""
    sums = {f"h{i + 1}": (f"h{i}", f"f{i}") for i in range(len(kinds))}
    blocks = {f"f{i}": kind for i, kind in enumerate(kinds)}
    inputs = {}
    for i in range(len(kinds)):
        inputs |= {f"f{i}": (f"h{i}",), f"h{i + 1}": sums[f"h{i + 1}"]}
    flow = Flow(
        inputs=inputs,
        paths={},
        outputs={f"h{len(kinds)}"},
        parameters={},
        sums=sums,
        passes={},
        tensors={"h0", *inputs},
        sizes=set(),
        alike=lambda a, b: True,
        named=False,
        operators=blocks | dict.fromkeys(sums, "Add"),
    )
    found = repeated_paths(flow, set(blocks))
    assert [found[f] for f in blocks] == [f"stack0.{n}" if n != " " else "" for n in layers]


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
