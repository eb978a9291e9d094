"""Quantised ONNX models: what is cut, how weights are counted and scored, what is frozen."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType

import graphprune as gp
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx.ort import saturates
from graphprune.oracle.masked_onnx import mask_onnx
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.passes.scores.magnitude import Magnitude
from graphprune.passes.shared.score import Inputs
from graphprune.pipeline.compiler import compile
from graphprune.report.inspection import explained
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, initialisers, planned, pruned, weights, written
from onnx_quantised import (
    CONVOLUTIONAL,
    RUNTIME,
    SHAPES,
    TRANSFORMER,
    bits_of,
    convolutional,
    dynamic,
    embedded,
    exactly,
    packed,
    static,
    stored_bytes,
    transformer,
)

KEEP = [1, 2, 5]  # of 8


def slimmed(file, folder, remove):
    """A program, what was kept, and the slim file, which the oracle has judged."""
    program = load_onnx(file, {"x": SHAPES[convolutional if "channels" in remove else transformer]})
    plan = gp.select(program, remove=remove, score="magnitude")
    slim = SlimOnnx(program, plan)
    slim.save(folder / "slim.onnx")
    certificate = verify_onnx(program, plan, folder / "slim.onnx")
    certificate.raise_if_failed()
    assert certificate.dense_difference > 0.01
    return program, plan, slim


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutions(tmp_path, kind):
    """Slim equals masked, and every file has as many bytes of weights as planned."""
    file = CONVOLUTIONAL[kind](tmp_path)
    program, plan, slim = slimmed(file, tmp_path, {"channels": 0.25})
    (units,) = plan.kept_units.values()
    assert len(units) == 6
    assert program.costs.total().params == 8 * 27 + 8 * 9 + 64 + 40 + 8 * 3 + 5
    assert slim.cost.params == 6 * 27 + 6 * 9 + 36 + 30 + 6 * 3 + 5
    assert program.costs.total().bytes == stored_bytes(file, program)
    assert slim.cost.bytes == stored_bytes(tmp_path / "slim.onnx", program)


BLOCKWISE = {"4 bits", "4 bits, no zero points", "4 bits, int8 inside", "8 bits", "4 bits, QDQ"}


@pytest.mark.parametrize("kind", TRANSFORMER)
def test_transformers(tmp_path, kind):
    file = TRANSFORMER[kind](tmp_path)
    program, plan, slim = slimmed(file, tmp_path, {"kv_heads": 0.5, "ffn": 0.25})
    kept = {program.by_name[name].role: len(units) for name, units in plan.kept_units.items()}
    sizes = {s.role: s.size for s in program.structures if s.prunable}
    assert sizes["kv_heads"] == (2 if kind in ("4 bits", "4 bits, int8 inside") else 4)
    assert kept["kv_heads"] == sizes["kv_heads"] // 2
    assert kept["ffn"] == sizes["ffn"] * 3 // 4
    assert (sizes["ffn"] < 128) == (kind in BLOCKWISE)
    norms = 2 if kind.startswith("QDQ") else 4  # equal scales and biases share what reads them
    assert program.costs.total().params == 4 * 64 * 64 + 2 * 64 * 128 + 128 + (3 + norms) * 64
    assert slim.cost.params == 4 * 64 * 32 + 2 * 64 * 96 + 96 + 32 + (2 + norms) * 64
    whole = SlimOnnx(program, gp.Plan(program.fingerprint, {}))  # norms share scales in the source
    whole.save(tmp_path / "whole.onnx")
    assert program.costs.total().bytes == stored_bytes(tmp_path / "whole.onnx", program)
    assert slim.cost.bytes == stored_bytes(tmp_path / "slim.onnx", program)


EMBEDDED = {
    "QDQ": lambda folder: static(embedded, folder),
    "QDQ, per channel": lambda folder: static(embedded, folder, per_channel=True),
    "operators": lambda folder: static(
        embedded, folder, quant_format=QuantFormat.QOperator, activation_type=QuantType.QUInt8
    ),
    "dynamic": lambda folder: dynamic(embedded, folder),
    "4 bits": lambda folder: packed(embedded(21), folder, symmetric=True),
}


@pytest.mark.parametrize("kind", EMBEDDED)
def test_everything_at_random(tmp_path, kind):
    """All structures at once: with the width, norms over what is left, some of them quantised."""
    file = EMBEDDED[kind](tmp_path)
    program = load_onnx(file, {"x": SHAPES[embedded]})
    roles = {s.role for s in program.structures if s.prunable}
    assert roles >= {"hidden", "kv_heads", "qk_dim", "ffn"}
    for seed, fraction in enumerate((0.25, 0.6)):
        plan = gp.select(program, remove={"*": fraction}, score="random", seed=seed)
        slim = SlimOnnx(program, plan)
        slim.save(tmp_path / "slim.onnx")
        certificate = verify_onnx(program, plan, tmp_path / "slim.onnx", seed=seed)
        certificate.raise_if_failed()
        assert certificate.dense_difference > 0.1
        assert slim.cost.bytes == stored_bytes(tmp_path / "slim.onnx", program)


def test_weights_scales_and_zero_points_are_cut_together(tmp_path):
    """One per column of a weight, one per row of the next one's transpose, and those of biases."""
    file = static(convolutional, tmp_path, per_channel=True)
    program = load_onnx(file)
    plan = planned(program, {("w1_quantized", 0): KEEP})
    SlimOnnx(program, plan).save(tmp_path / "slim.onnx")
    verify_onnx(program, plan, tmp_path / "slim.onnx").raise_if_failed()
    dense, slim = (initialisers(onnx.load(f)) for f in (file, tmp_path / "slim.onnx"))
    for name in ("w1", "w2", "w3"):
        for part in ("quantized", "scale", "zero_point"):
            tensor = dense[f"{name}_{part}"][KEEP]
            rows = tensor[:, KEEP] if (name, part) == ("w3", "quantized") else tensor
            np.testing.assert_array_equal(slim[f"{name}_{part}"], rows)
    for name in ("b1", "b2", "b3"):
        for part in ("quantized", "quantized_scale", "quantized_zero_point"):
            np.testing.assert_array_equal(slim[f"{name}_{part}"], dense[f"{name}_{part}"][KEEP])
    np.testing.assert_array_equal(slim["w4_quantized"], dense["w4_quantized"][:, KEEP])
    np.testing.assert_array_equal(slim["w4_scale"], dense["w4_scale"])


def quantised(x, scale, zero, low, high):
    return np.clip(np.rint(x / scale) + zero, low, high)


def test_a_linear_layer_in_float64(tmp_path):
    """Unsigned activations, weights by column, a bias in steps of both; worked out in numpy."""
    steps = {"x": 0.05, "h": 0.11}
    w, v = weights(6, 8), weights(8, 4)
    columns = np.abs(w).max(axis=0).astype(np.float32) / 127
    row = np.float32(np.abs(v).max() / 127)
    wq, vq = np.rint(w / columns).astype(np.int8), np.rint(v / row).astype(np.int8)
    beyond = (np.float32(steps["x"]) * columns).astype(np.float32)
    bias = np.rint(weights(8) / beyond).astype(np.int32)
    points = np.array([3, 0, -2, 1, 0, 5, 0, -1], np.int8)
    model = graph(
        """g (float[N,6] x) => (float[N,4] y) {
        xq = QuantizeLinear(x, xs, xz)  xd = DequantizeLinear(xq, xs, xz)
        wd = DequantizeLinear<axis = 1>(w, ws, wz)  m = MatMul(xd, wd)
        bd = DequantizeLinear<axis = 0>(b, bs)  h = Add(m, bd)
        hq = QuantizeLinear(h, hs, hz)  hd = DequantizeLinear(hq, hs, hz)
        vd = DequantizeLinear(v, vs)  y = MatMul(hd, vd) }""",
        xs=np.float32(steps["x"]),
        xz=np.uint8(120),
        hs=np.float32(steps["h"]),
        hz=np.uint8(0),
        w=wq,
        ws=columns,
        wz=points,
        b=bias,
        bs=beyond,
        v=vq,
        vs=row,
    )
    slim = pruned(model, tmp_path, {("w", 1): KEEP})
    x = 2 * weights(16, 6, seed=3)
    xd = (quantised(x.astype(np.float64), np.float32(0.05), 120, 0, 255) - 120) * np.float32(0.05)
    wd = (wq.astype(np.float64) - points) * columns
    h = xd @ wd[:, KEEP] + (bias * beyond.astype(np.float64))[KEEP]
    hd = quantised(h, np.float32(0.11), 0, 0, 255) * np.float64(np.float32(0.11))
    (found,) = exactly(slim, x=x)
    np.testing.assert_allclose(found, hd @ (vq[KEEP] * np.float64(row)), rtol=1e-5, atol=1e-5)
    hidden = next(s for s in load_onnx(tmp_path / "dense.onnx").structures if s.size == 8)
    assert hidden.role == "ffn"  # a zero point at the end of the range is a ReLU


def test_weights_are_what_the_runtime_dequantises(tmp_path):
    """For tensors, columns and blocks, of 8 and 4 bits."""
    rng = np.random.default_rng(0)
    four = rng.integers(-8, 8, (64, 8))
    model = graph(
        """g (float[N,64] x) => (float[64,8] a, float[64,8] b, float[64,8] c, float[N,8] y) {
        a = DequantizeLinear(p, s, z)  b = DequantizeLinear<axis = -1>(q, ss, zs)
        c = DequantizeLinear<axis = 0, block_size = 16>(r, sss)
        d = Add(a, b)  e = Add(c, d)  y = MatMul(x, e) }""",
        opset=21,
        ir_version=10,
        p=rng.integers(0, 255, (64, 8)).astype(np.uint8),
        s=np.float32(0.02),
        z=np.uint8(130),
        q=rng.integers(-128, 127, (64, 8)).astype(np.int8),
        ss=np.abs(weights(8)),
        zs=np.arange(8, dtype=np.int8),
        r=helper.make_tensor("r", onnx.TensorProto.INT4, (64, 8), four.reshape(-1)),
        sss=np.abs(weights(4, 8)),
    )
    file = written(model, tmp_path)
    program = load_onnx(file)
    found = exactly(file, x=weights(1, 64))
    for name, wanted in zip("pqr", found, strict=False):
        np.testing.assert_allclose(program.weights[name].numpy(), wanted, rtol=1e-6)
    assert program.trainable == set("pqr")


@pytest.mark.parametrize("kind", ["QDQ", "QDQ, per channel", "operators", "dynamic", "8 bits"])
def test_scores_are_those_of_the_numbers_that_weights_stand_for(tmp_path, kind):
    quantised = load_onnx(TRANSFORMER[kind](tmp_path))
    dense = load_onnx(written(transformer(), tmp_path, "float.onnx"))
    sums = []
    for program in (dense, quantised):
        (inner,) = (s for s in program.structures if s.role == "ffn")
        rows = Magnitude("l1").score(program, [inner], Inputs())[inner.name]
        # A bias isn't tied to blocks of columns, and has a member of its own.
        sums.append(rows.sum(axis=0))
    blocks = sums[0].reshape(len(sums[1]), -1).sum(axis=1)
    np.testing.assert_allclose(sums[1], blocks, rtol=0.02)


def test_inspect_names_the_weights(tmp_path):
    program = load_onnx(static(transformer, tmp_path, per_channel=True))
    lines = explained(program, "wu_quantized")
    assert any("prunable: ffn, 128 units" in line for line in lines)
    assert any("wu_scale:0" in line and "wd_quantized:0" in line for line in lines)


def own(operator, inputs, **attributes):
    """A layer of eight columns, quantised, then one of ONNX Runtime's operators on it."""
    model = graph(
        """g (float[2,5] x) => (float[2,8] y) {
        m = MatMul(x, a)  h = QuantizeLinear(m, s, z)  y = DequantizeLinear(r, s, z) }""",
        a=weights(5, 8),
        s=np.float32(0.05),
        z=np.uint8(128),
    )
    node = helper.make_node(operator, inputs, ["r"], domain=RUNTIME, **attributes)
    model.graph.node.insert(2, node)
    model.opset_import.append(helper.make_opsetid(RUNTIME, 1))
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (own("QLinearReduceMean", ["h", "s", "z", "s", "z"], axes=[0]), "QLinearReduceMean"),
        (own("QLinearSoftmax", ["h", "s", "z", "s", "z"], opset=13), "softmax of quantised"),
        (own("QLinearAdd", ["h", "a", "z", "h", "s", "z", "s", "z"]), "QLinearAdd: several scales"),
    ],
)
def test_what_has_no_plain_layout_stays(tmp_path, model, why):
    program = load_onnx(written(model, tmp_path))
    assert why in program.frozen()["a", 1]


def test_behind_an_operator_of_unknown_shape_the_rest_is_pruned(tmp_path):
    """A norm there has no axes, and needs no formula."""
    model = own("QLinearWhere", ["t", *"hszhszsz"])
    rest = graph(
        """g (float[2,5] x) => (float[2,8] n, float[2,3] k) {
        n = LayerNormalization<axis = -1>(y, g)
        i = MatMul(x, b)  j = Relu(i)  k = MatMul(j, c) }""",
        t=np.array([[True], [False]]),
        g=weights(8),
        b=weights(5, 6),
        c=weights(6, 3),
    )
    model.graph.node.extend(rest.graph.node)
    model.graph.initializer.extend(rest.graph.initializer)
    del model.graph.output[:]
    model.graph.output.extend(rest.graph.output)
    slim = pruned(model, tmp_path, {("b", 1): [0, 3]})
    assert initialisers(onnx.load(slim))["c"].shape == (2, 3)


def test_concatenated_integers(tmp_path):
    model = own("QLinearConcat", ["s", "z", "h", "s", "z", "k", "t", "u"], axis=1)
    more = graph(
        """g (float[2,5] x) => (float[2,3] y) {
        n = MatMul(x, b)  k = QuantizeLinear(n, t, u)
        d = DequantizeLinear(r, s, z)  y = MatMul(d, c) }""",
        b=weights(5, 6),
        t=np.float32(0.03),
        u=np.uint8(100),
        c=weights(14, 3),
    )
    nodes = [*more.graph.node[:2], *model.graph.node[:3], *more.graph.node[2:]]
    del more.graph.node[:]
    more.graph.node.extend(nodes)
    more.graph.initializer.extend(model.graph.initializer)
    more.opset_import.append(helper.make_opsetid(RUNTIME, 1))
    slim = pruned(more, tmp_path, {("a", 1): KEEP, ("b", 1): [0, 4]})
    assert initialisers(onnx.load(slim))["c"].shape == (5, 3)


@pytest.mark.parametrize("operator", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
def test_products_of_onnx_runtime(tmp_path, operator):
    rng = np.random.default_rng(3)
    low, high = (-64, 64) if saturates() else (-128, 127)
    model = graph(
        """g (float[N,5] x) => (float[N,4] y) {
        h = MatMul(x, a)  q, hs, hz = DynamicQuantizeLinear(h)  y = MatMul(m, c) }""",
        a=weights(5, 8),
        c=weights(6, 4),
        w=rng.integers(low, high, (8, 6)).astype(np.int8),
        ws=np.abs(weights(6)) / 100,
        wz=np.arange(6, dtype=np.int8),
        b=weights(6),
    )
    if operator.startswith("Dynamic"):
        inputs = ["h", "w", "ws", "wz", "b"]
        del model.graph.node[1]
    else:
        inputs = ["q", "w", "hs", "ws", "hz", "wz", "b"]
    node = helper.make_node(operator, inputs, ["m"], domain=RUNTIME)
    model.graph.node.insert(len(model.graph.node) - 1, node)
    model.opset_import.append(helper.make_opsetid(RUNTIME, 1))
    slim = pruned(model, tmp_path, {("a", 1): KEEP, ("w", 1): [0, 2, 3, 5]})
    cut = initialisers(onnx.load(slim))
    assert cut["w"].shape == (3, 4)
    assert cut["wz"].tolist() == [0, 2, 3, 5]


def test_a_table_that_is_dequantised_after_the_look_up(tmp_path):
    model = graph(
        """g (int64[N] i) => (float[N,4] y) {
        r = Gather(t, i)  h = DequantizeLinear(r, s, z)  y = MatMul(h, c) }""",
        t=np.random.default_rng(0).integers(0, 255, (30, 8)).astype(np.uint8),
        s=np.float32(0.02),
        z=np.uint8(100),
        c=weights(8, 4),
    )
    slim = pruned(model, tmp_path, {("t", 1): KEEP})
    program = load_onnx(tmp_path / "dense.onnx")
    table = initialisers(model)["t"]
    np.testing.assert_allclose(
        program.weights["t"].numpy(), (table - 100.0) * np.float32(0.02), rtol=1e-6
    )
    assert initialisers(onnx.load(slim))["t"].tobytes() == table[:, KEEP].tobytes()


def test_removed_integers_become_the_zero_point(tmp_path):
    """In the masked model; the range of what is left is that of the kept numbers and zero."""
    model = graph(
        """g (float[4,5] x) => (float[4,3] y, uint8[4,8] q, float hs, uint8 hz) {
        h = MatMul(x, a)  q, hs, hz = DynamicQuantizeLinear(h)
        m = MatMulInteger(q, w, hz, wz)  f = Cast<to = 1>(m)
        s = Mul(hs, ws)  y = Mul(f, s) }""",
        a=weights(5, 8) + 1,
        w=np.random.default_rng(0).integers(0, 255, (8, 3)).astype(np.uint8),
        ws=np.float32(0.01),
        wz=np.uint8(77),
    )
    del model.graph.output[1]  # it would freeze the axis; it is put back into the masked model
    program = load_onnx(written(model, tmp_path))
    plan = planned(program, {("a", 1): KEEP})
    masked = program.model.clone()
    mask_onnx(masked, program.known, program.typing, plan.bind(program).keep)
    (product,) = (n for n in masked.graph if n.op_type == "MatMulInteger")
    quantised, weight = product.inputs[:2]
    quantised.type, quantised.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape((4, 8))
    masked.graph.outputs.append(quantised)
    ir.save(masked, tmp_path / "masked.onnx")
    x = weights(4, 5, seed=4)
    _, scale, zero, q = exactly(tmp_path / "masked.onnx", x=x)
    h = (x @ initialisers(model)["a"])[:, KEEP]
    low, high = min(h.min(), 0), max(h.max(), 0)
    np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-6)
    gone = [i for i in range(8) if i not in KEEP]
    assert (q[:, gone] == zero).all()
    assert zero > 0
    stored = weight.const_value.numpy()
    assert (stored[gone] == 77).all()
    np.testing.assert_array_equal(stored[KEEP], initialisers(model)["w"][KEEP])


def test_compile(tmp_path):
    file = static(convolutional, tmp_path)
    report = compile(file, {"remove": {"channels": 0.25}}, tmp_path / "slim.onnx")
    assert report.after.parameters == 6 * 27 + 6 * 9 + 36 + 30 + 6 * 3 + 5
    assert any("quantisation steps" in note for note in report.notes)
    tensors = {t.name: t for t in onnx.load(tmp_path / "slim.onnx").graph.initializer}
    assert bits_of(tensors["w1_quantized"]) == 8
    assert numpy_helper.to_array(tensors["b1_quantized"]).dtype == np.int32
