"""Slim ONNX models, continued: places, shapes, sharing and what is frozen."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphprune.frontends.onnx.load import load_onnx
from onnx_graphs import (
    agree,
    graph,
    initialisers,
    pruned,
    weights,
    written,
)

KEEP = [0, 2, 3, 6]  # of 8
X = weights(4, 5, seed=9)
IMAGE = weights(2, 3, 6, 6, seed=9)


def relu(x):
    return np.maximum(x, 0)


def test_equal_biases_that_an_exporter_merged(tmp_path):
    """Layers that share nothing but the values of their biases are cut apart from each other."""
    a, b, c, bias = weights(5, 8), weights(8, 8, seed=1), weights(8, 3, seed=2), weights(8)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        f = MatMul(x, a)  g = Add(f, bias)  h = Relu(g)
        i = MatMul(h, b)  j = Add(i, bias)  k = Relu(j)
        y = MatMul(k, c) }""",
        a=a,
        b=b,
        c=c,
        bias=bias,
    )
    wanted = relu(relu(X @ a[:, KEEP] + bias[KEEP]) @ b[KEEP] + bias) @ c
    slim = initialisers(agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X))
    assert slim["a"].shape == (5, 4)
    assert slim["b"].shape == (4, 8)
    assert sorted(t.shape for n, t in slim.items() if n.startswith("bias")) == [(4,), (8,)]


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_gather_of_constant_places(tmp_path, kind):
    """Channel shuffle by a table, as some exporters write it."""
    a, c = weights(5, 8), weights(8, 3)
    order = np.array([3, 0, -1, 2, 1, 4, 6, 5])
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  s = Gather<axis = 1>(h, order)  y = MatMul(s, c) }""",
        a=a,
        c=c,
        order=order.astype(kind),
    )
    places = order % 8
    rows = [i for i in range(8) if places[i] in KEEP]
    wanted = X @ a[:, places[rows]] @ c[rows]
    slim = agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X)
    (found,) = (v for v in initialisers(slim).values() if v.dtype.kind == "i")
    assert found.dtype == kind


def test_gather_nd_of_constant_places(tmp_path):
    a, c = weights(5, 8), weights(8, 3)
    order = np.array([3, 0, 7, 2, 1, 4, 6, 5])
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  t = Transpose(h)  s = GatherND(t, order)  u = Transpose(s)
        y = MatMul(u, c) }""",
        a=a,
        c=c,
        order=order[:, None],
    )
    rows = [i for i in range(8) if order[i] in KEEP]
    wanted = X @ a[:, order[rows]] @ c[rows]
    agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X)


RESHAPES = {
    "literal": (11, "", np.array([2, 3, 4, 2])),
    "-1 for the batch": (11, "", np.array([-1, 3, 4, 2])),
    "-1 for heads": (11, "", np.array([0, 0, -1, 2])),
    "-1 for the head's width": (13, "", np.array([0, 0, 4, -1])),
    "computed": (
        13,
        """sh = Shape(x)  i0 = Constant<value = int64[1] {0}>()
        i1 = Constant<value = int64[1] {1}>()  n = Gather<axis = 0>(sh, i0)
        t = Gather<axis = 0>(sh, i1)  hd = Constant<value = int64[2] {4, 2}>()
        shape = Concat<axis = 0>(n, t, hd)""",
        None,
    ),
    "computed from the width": (
        13,
        """sh = Shape(h)  i0 = Constant<value = int64[2] {0, 1}>()
        i2 = Constant<value = int64[1] {2}>()  two = Constant<value = int64[1] {2}>()
        n = Gather<axis = 0>(sh, i0)  w = Gather<axis = 0>(sh, i2)  d = Div(w, two)
        shape = Concat<axis = 0>(n, d, two)""",
        None,
    ),
}
TOKENS = weights(2, 3, 5, seed=9)


@pytest.mark.parametrize("name", RESHAPES)
def test_reshape_into_heads(tmp_path, name):
    opset, before, shape = RESHAPES[name]
    a, c = weights(5, 8), weights(8, 3)
    batch = "2" if name == "literal" else "N"
    arrays = {} if shape is None else {"shape": shape}
    model = graph(
        f"""g (float[{batch},3,5] x) => (float[{batch},3,3] y) {{
        h = MatMul(x, a)  {before}  r = Reshape(h, shape)
        p = Transpose<perm = [0, 2, 1, 3]>(r)  k = Relu(p)
        q = Transpose<perm = [0, 2, 1, 3]>(k)  f = Reshape(q, flat)  y = MatMul(f, c) }}""",
        opset=opset,
        a=a,
        c=c,
        flat=np.array([0, 0, -1]),
        **arrays,
    )
    heads = [0, 3]
    rows = [2 * h + i for h in heads for i in (0, 1)]
    wanted = relu(TOKENS @ a[:, rows]) @ c[rows]
    kept = {("a", 1, 4): heads}
    agree(model, tmp_path, kept, [wanted], x=TOKENS)


def test_a_shape_shared_by_layers_that_keep_other_numbers_of_heads(tmp_path):
    a, b, c, d = weights(5, 8), weights(5, 8, seed=1), weights(4, 2, 3), weights(4, 2, 3, seed=1)
    model = graph(
        """g (float[N,3,5] x) => (float[N,3,3] y) {
        h = MatMul(x, a)  i = MatMul(x, b)
        p = Reshape(h, shape)  q = Reshape(i, shape)
        s = Einsum<equation = "nthd,hdo->nto">(p, c)  t = Einsum<equation = "nthd,hdo->nto">(q, d)
        y = Add(s, t) }""",
        a=a,
        b=b,
        c=c,
        d=d,
        shape=np.array([0, 0, 4, 2]),
    )
    three = [0, 1, 2, 3, 6, 7]
    wanted = TOKENS @ a[:, [2, 3]] @ c[1] + TOKENS @ b[:, three] @ d[[0, 1, 3]].reshape(6, 3)
    agree(model, tmp_path, {("c", 0): [1], ("d", 0): [0, 1, 3]}, [wanted], x=TOKENS)


def test_expand_of_lower_rank(tmp_path):
    """The shape names fewer dimensions than the tensor has."""
    a, c = weights(5, 1), weights(8, 3)
    model = graph(
        """g (float[N,3,5] x) => (float[N,3,3] y) {
        h = MatMul(x, a)  e = Expand(h, shape)  f = Mul(e, b)  y = MatMul(f, c) }""",
        a=a,
        b=weights(8),
        c=c,
        shape=np.array([8]),
    )
    wanted = (TOKENS @ a * weights(8)[KEEP]) @ c[KEEP]
    agree(model, tmp_path, {("c", 0): KEEP}, [wanted], x=TOKENS)


def test_an_initialiser_that_two_read(tmp_path):
    """Tied weights: the embedding's rows are the columns of the last layer."""
    table, a, b = weights(11, 8), weights(8, 8), weights(8)
    model = graph(
        """g (int64[N,T] ids) => (float[N,T,11] y) {
        h = Gather(table, ids)  i = MatMul(h, a)  j = Add(h, i)  k = Mul(j, b)
        t = Transpose<perm = [1, 0]>(table)  y = MatMul(k, t) }""",
        table=table,
        a=a,
        b=b,
    )
    ids = np.array([[1, 4, 10], [0, 3, 3]])
    t = table[:, KEEP]
    h = t[ids]
    wanted = ((h + h @ a[KEEP][:, KEEP]) * b[KEEP]) @ t.T
    agree(model, tmp_path, {("table", 1): KEEP}, [wanted], ids=ids)


def test_constant_nodes_and_weights_behind_other_operators(tmp_path):
    a, c = weights(8, 5), weights(8, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        t = Transpose<perm = [1, 0]>(a)  h = MatMul(x, t)
        b = Constant<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>()
        j = Add(h, b)  r = Relu(j)  k = Identity(c)  l = Identity(k)  y = MatMul(r, l) }""",
        a=a,
        c=c,
    )
    bias = np.arange(1, 9, dtype=np.float32)
    wanted = relu(X @ a[KEEP].T + bias[KEEP]) @ c[KEEP]
    agree(model, tmp_path, {("a", 0): KEEP}, [wanted], x=X)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_quantised_weights(tmp_path, kind):
    low = -100 if kind is np.int8 else 0
    rng = np.random.default_rng(0)
    a = rng.integers(low, low + 200, (8, 5)).astype(kind)
    scale = (np.abs(weights(8)) + 0.1) / 100
    zero = rng.integers(low + 50, low + 60, 8).astype(kind)
    c = weights(8, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        w = DequantizeLinear<axis = 0>(a, scale, zero)
        h = Gemm<transB = 1>(x, w)  r = Relu(h)  y = MatMul(r, c) }""",
        a=a,
        scale=scale,
        zero=zero,
        c=c,
    )
    real = (a.astype(np.float32) - zero.astype(np.float32)[:, None]) * scale[:, None]
    slim = agree(model, tmp_path, {("a", 0): KEEP}, [relu(X @ real[KEEP].T) @ c[KEEP]], x=X)
    found = initialisers(slim)
    assert found["a"].dtype == kind
    np.testing.assert_array_equal(found["zero"], zero[KEEP])


def test_the_norm_of_a_single_row_is_no_constant(tmp_path):
    """Weight normalisation to one output: its norm is one number, and is of what is kept."""
    a, v = weights(5, 8), weights(8, 1)
    model = graph(
        """g (float[N,5] x) => (float[N,1] y) {
        h = MatMul(x, a)  r = Relu(h)  n = ReduceL2<axes = [0]>(v)
        w = Div(v, n)  y = MatMul(r, w) }""",
        a=a,
        v=v,
    )
    left = v[KEEP]
    wanted = relu(X @ a[:, KEEP]) @ (left / np.sqrt((left**2).sum()))
    agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X)


def test_the_scale_of_attention_stays(tmp_path):
    """The width of a head is read from the graph; the scale is of the dense model."""
    q, k, c = weights(5, 8), weights(5, 8, seed=1), weights(3, 3)
    model = graph(
        """g (float[N,3,5] x) => (float[N,3,3] y) {
        a = MatMul(x, q)  b = MatMul(x, k)  t = Transpose<perm = [0, 2, 1]>(b)
        s = MatMul(a, t)  z = Shape<start = 2>(a)  f = Cast<to = 1>(z)  d = Sqrt(f)
        u = Div(s, d)  y = MatMul(u, c) }""",
        q=q,
        k=k,
        c=c,
    )
    scores = (TOKENS @ q[:, KEEP]) @ (TOKENS @ k[:, KEEP]).transpose(0, 2, 1)
    agree(model, tmp_path, {("q", 1): KEEP}, [scores / np.sqrt(8) @ c], x=TOKENS)


def test_stale_shapes_are_forgotten(tmp_path):
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) <float[N,8] h, float[N,8] r> {
        h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }""",
        a=weights(5, 8),
        c=weights(8, 3),
    )
    assert len(model.graph.value_info) == 2
    slim = onnx.load(pruned(model, tmp_path, {("a", 1): KEEP}))
    shapes = [v.type.tensor_type.shape.dim for v in slim.graph.value_info]
    assert all(d.dim_value != 8 for dims in shapes for d in dims)


def test_an_operator_of_another_domain_is_frozen(tmp_path):
    """It bears the name of a standard operator, and means something else."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"], domain="somebody"),
        helper.make_node("MatMul", ["r", "c"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 5])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])]
    tensors = [
        onnx.numpy_helper.from_array(weights(5, 8), "a"),
        onnx.numpy_helper.from_array(weights(8, 3), "c"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("somebody", 1)],
        ir_version=8,
    )
    program = load_onnx(written(model, tmp_path))
    assert "somebody.Relu" in program.frozen()["a", 1]


def test_places_in_a_pooled_image_freeze_the_channels(tmp_path):
    """MaxPool's indices count through all channels."""
    model = graph(
        """g (float[N,3,6,6] x) => (float[N,2,3,3] y, float[N,1,3,3] z) {
        h = Conv(x, a)  p, i = MaxPool<kernel_shape = [2,2], strides = [2,2]>(h)
        f = Cast<to = 1>(i)  m = ReduceMax<axes = [1]>(f)  z = Identity(m)  y = Conv(p, c) }""",
        a=weights(8, 3, 1, 1),
        c=weights(2, 8, 1, 1),
    )
    program = load_onnx(written(model, tmp_path))
    assert ("a", 0) in program.frozen()


def test_layers_of_other_lengths_with_dynamic_shapes_of_the_cut_axis(tmp_path):
    """``x.reshape(N * heads, ...)``: one number holds a dynamic size and one that changes."""
    a, c = weights(5, 8), weights(8, 3)
    model = graph(
        """g (float[N,3,5] x) => (float[N,3,3] y) {
        h = MatMul(x, a)  r = Reshape(h, split)  p = Transpose<perm = [0, 2, 1, 3]>(r)
        sh = Shape<end = 1>(x)  four = Constant<value = int64[1] {4}>()  nh = Mul(sh, four)
        rest = Constant<value = int64[2] {3, 2}>()  s = Concat<axis = 0>(nh, rest)
        m = Reshape(p, s)  k = Relu(m)
        rest2 = Constant<value = int64[3] {4, 3, 2}>()  s2 = Concat<axis = 0>(sh, rest2)
        b = Reshape(k, s2)  q = Transpose<perm = [0, 2, 1, 3]>(b)
        f = Reshape(q, flat)  y = MatMul(f, c) }""",
        a=a,
        c=c,
        split=np.array([0, 0, 4, 2]),
        flat=np.array([0, 0, 8]),
    )
    rows = [2, 3, 4, 5, 6, 7]
    wanted = relu(TOKENS @ a[:, rows]) @ c[rows]
    agree(model, tmp_path, {("a", 1, 4): [1, 2, 3]}, [wanted], x=TOKENS)


def test_a_slim_model_is_dynamic_where_the_dense_one_is(tmp_path):
    a, c = weights(5, 8), weights(8, 3)
    model = graph(
        "g (float[N,T,5] x) => (float[N,T,3] y) { h = MatMul(x, a) y = MatMul(h, c) }", a=a, c=c
    )
    x = weights(1, 17, 5)
    slim = agree(model, tmp_path, {("a", 1): KEEP}, [x @ a[:, KEEP] @ c[KEEP]], x=x)
    dims = slim.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["N", "T", 5]


def test_one_hot_of_places_of_the_cut_axis(tmp_path):
    a, c = weights(5, 8), weights(8, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        s = MatMul(x, a)  v, i = TopK(s, one)  p = Squeeze(i, one)
        o = OneHot(p, depth, values)  y = MatMul(o, c) }""",
        a=a,
        c=c,
        one=np.array([1]),
        depth=np.array(8),
        values=np.array([0, 1], np.float32),
    )
    chosen = (X @ a[:, KEEP]).argmax(axis=1)
    agree(model, tmp_path, {("a", 1): KEEP}, [c[KEEP][chosen]], x=X)


def test_a_range_from_a_computed_place_is_frozen(tmp_path):
    """Its numbers count places, and only a constant could hold those that stay."""
    model = graph(
        """g (float[N,5] x, int64 start) => (float[N,3] y) {
        end = Add(start, n)  r = Range(start, end, step)  f = Cast<to = 1>(r)
        h = MatMul(x, a)  m = Mul(h, f)  y = MatMul(m, c) }""",
        a=weights(5, 8),
        c=weights(8, 3),
        n=np.array(8),
        step=np.array(1),
    )
    program = load_onnx(written(model, tmp_path))
    assert ("a", 1) in program.frozen()


def test_a_constant_of_two_cut_axes(tmp_path):
    """Every head keeps the same of its dimensions, as the constant can't tell heads apart."""
    a, c = weights(5, 8), weights(8, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  r = Reshape(h, split)  i = Range(zero, eight, one)
        g = Reshape(i, grid)  f = Cast<to = 1>(g)  m = Mul(r, f)
        k = Relu(m)  q = Reshape(k, flat)  y = MatMul(q, c) }""",
        a=a,
        c=c,
        split=np.array([0, 4, 2]),
        grid=np.array([4, 2]),
        flat=np.array([0, 8]),
        zero=np.array(0),
        eight=np.array(8),
        one=np.array(1),
    )
    program = load_onnx(written(model, tmp_path))
    assert not any(s.within for s in program.structures if s.prunable)
    rows = [2, 3, 6, 7]
    wanted = relu(X @ a[:, rows] * np.float32(rows)) @ c[rows]
    agree(model, tmp_path, {("a", 1, 4): [1, 3]}, [wanted], x=X)
