"""Shapes and the arithmetic on them: folded, dynamic, or unknown."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from graphprune.errors import LoadError
from graphprune.frontends.onnx.read import read_onnx
from graphprune.ir.onnx.shapes.sizes import known_values
from graphprune.ops.context import Size
from onnx_graphs import agree, graph, weights, written


def known(model, tmp_path, shapes=None):
    return known_values(read_onnx(written(model, tmp_path)), shapes)


HEADS = {
    11: """u = Unsqueeze<axes = [0]>(n)  v = Unsqueeze<axes = [0]>(t)
        w = Unsqueeze<axes = [0]>(d)""",
    13: "u = Unsqueeze(n, zero)  v = Unsqueeze(t, zero)  w = Unsqueeze(d, zero)",
}


@pytest.mark.parametrize("opset", HEADS)
def test_a_shape_from_pieces(tmp_path, opset):
    """What torch's exporter makes of ``x.view(n, t, 4, d // 4)``."""
    arrays = {"zero": np.array([0])} if opset == 13 else {}
    model = graph(
        f"""g (float[batch,time,16] x) => (float[batch,time,4,4] y) {{
        s = Shape(x)  n = Gather(s, i)  t = Gather(s, j)  e = Gather(s, k)  d = Div(e, four)
        {HEADS[opset]}
        shape = Concat<axis = 0>(u, v, h, w)  y = Reshape(x, shape) }}""",
        opset=opset,
        i=np.array(0),
        j=np.array(1),
        k=np.array(2),
        four=np.array(4),
        h=np.array([4]),
        **arrays,
    )
    found = known(model, tmp_path)
    assert found["d"].constant == 4
    assert found["w"].constant.tolist() == [4]
    assert found["n"].constant is None
    assert [v.tolist() for v in found["shape"].values] == [[2, 7, 4, 4], [3, 11, 4, 4]]
    assert found["shape"].constant is None
    assert found["shape"].sizes == (Size(4),)
    assert found["y"].shapes == ((2, 7, 4, 4), (3, 11, 4, 4))
    assert [s.dynamic for s in found["y"].sizes] == [True, True, False, False]


def test_sizes_in_proportion_to_an_input(tmp_path):
    """The factor is what all sizes of the result are multiples of."""
    model = graph(
        """g (float[N,6] x) => (float[M,2] y) { y = Reshape(x, shape) }""",
        shape=np.array([-1, 2]),
    )
    (rows, columns) = known(model, tmp_path)["y"].sizes
    assert rows == Size(6, dynamic=True, factor=3)
    assert columns == Size(2)


@pytest.mark.parametrize(
    ("opset", "body", "arrays"),
    [
        (11, "y = Squeeze<axes = [1]>(x)", {}),
        (13, "y = Squeeze(x, a)", {"a": np.array([1])}),
        (11, "p, y = Split<axis = 2, split = [1, 4]>(x)  q = Squeeze<axes = [1]>(y)", {}),
        (13, "p, y = Split<axis = 2>(x, a)", {"a": np.array([1, 4])}),
        (18, "y = ReduceSum(x, a)", {"a": np.array([1])}),
        (11, "y = ReduceSum<axes = [1]>(x)", {}),
    ],
)
def test_attributes_and_inputs(tmp_path, opset, body, arrays):
    outs = {"Squeeze(": "N,5", "Squeeze<": "N,5", "ReduceSum": "N,1,5", "p,": "N,1,4"}
    out = next(v for k, v in outs.items() if body.removeprefix("y = ").startswith(k))
    model = graph(f"g (float[N,1,5] x) => (float[{out}] y) {{ {body} }}", opset=opset, **arrays)
    wanted = tuple(int(n) for n in out.replace("N", "2").split(","))
    assert known(model, tmp_path)["y"].shapes[0] == wanted


def test_constants_of_every_kind(tmp_path):
    model = graph(
        """g (float[N,4] x) => (float[N,4] y) {
        a = Constant<value = int64[2] {3, 4}>()  b = Constant<value_ints = [5, 6]>()
        c = Constant<value_int = 7>()  d = Constant<value_float = 0.5>()
        e = Add(a, b)  f = Mul(e, c)  s = ReduceMax<keepdims = 0>(f)  r = Cast<to = 1>(s)
        t = Mul(r, d)  o = ConstantOfShape<value = int64[1] {9}>(two)  w = Range(z, c, k)
        v = Mul(x, t)  l = ReduceSum<keepdims = 0>(o)  m = ReduceSum<keepdims = 0>(w)
        n = Add(l, m)  p = Cast<to = 1>(n)  y = Add(v, p) }""",
        two=np.array([2]),
        z=np.array(1),
        k=np.array(2),
    )
    found = known(model, tmp_path)
    assert found["f"].constant.tolist() == [56, 70]
    assert found["t"].constant == 35
    assert found["o"].constant.tolist() == [9, 9]
    assert found["w"].constant.tolist() == [1, 3, 5]


@pytest.mark.parametrize(("opset", "wanted"), [(11, None), (13, 0.5)])
def test_results_of_an_old_operator_are_of_its_version(tmp_path, opset, wanted):
    """Softmax of opset 11 runs over all dimensions from its axis on: no reference computes that."""
    model = graph(
        "g (float[2,2] x) => (float[2,2] y) { s = Softmax<axis = 0>(c)  y = Add(x, s) }",
        opset=opset,
        c=np.zeros((2, 2), np.float32),
    )
    found = known(model, tmp_path)["s"].values
    assert found is None if wanted is None else found[0].tolist() == [[wanted] * 2] * 2


def test_numbers_of_weights_are_told_apart(tmp_path):
    """A norm of a weight changes where the weight is cut; its sizes are known all the same."""
    model = graph(
        """g (float[N,4] x) => (float[N,4] y) {
        n = ReduceL2<keepdims = 0>(w)  p = Mul(n, n)  s = Shape(w)  z = Size(p)
        h = Mul(x, p)  i = Mul(h, half)  q = Add(s, z)  r = Cast<to = 1>(q)  y = Add(i, r) }""",
        w=weights(4),
        half=np.array(0.5, np.float32),
    )
    found = known(model, tmp_path)
    assert found["w"].weighted
    assert found["n"].weighted
    assert found["p"].weighted
    assert found["s"].constant.tolist() == [4]
    assert not found["s"].weighted
    assert not found["z"].weighted
    assert not found["half"].weighted


def test_large_and_dynamic_values_are_not_computed(tmp_path):
    model = graph(
        """g (float[N,T] x) => (float[N,T] y) {
        b = Neg(a)  s = Shape(x)  e = ConstantOfShape(s)  f = Add(x, e)  g = ReduceSum(b)
        y = Add(f, g) }""",
        opset=11,
        a=weights(100, 100),
    )
    found = known(model, tmp_path)
    assert found["a"].values is None
    assert found["b"].values is None
    assert [v.tolist() for v in found["s"].values] == [[2, 7], [3, 11]]
    assert found["y"].constant is None


def test_shapes_that_depend_on_data_are_unknown(tmp_path):
    model = graph(
        "g (float[N,4] x) => (int64[2,M] y) { n = NonZero(x)  y = Identity(n) }",
    )
    found = known(model, tmp_path)
    assert "n" not in found
    assert "y" not in found


def test_random_numbers_are_unknown(tmp_path):
    model = graph(
        """g (float[N,4] x) => (float[N,4] y) {
        r = RandomNormal<shape = [1, 4], dtype = 1>()  y = Add(x, r) }"""
    )
    found = known(model, tmp_path)
    assert found["r"].values is None
    assert found["r"].shapes[0] == (1, 4)


def test_group_norm_has_the_shape_of_its_operand(tmp_path):
    """A function of ONNX, which its shape inference doesn't look into."""
    model = graph(
        """g (float[N,8,H,W] x) => (float[N,8,H,W] y) {
        y = GroupNormalization<num_groups = 2>(x, a, a) }""",
        opset=21,
        ir_version=10,
        a=weights(8),
    )
    assert known(model, tmp_path)["y"].shapes == ((2, 8, 64, 64), (3, 8, 96, 96))


def fixed(tmp_path):
    """A model whose symbol can only be 30: a reshape says so."""
    return graph(
        "g (float[N,T] x) => (float[N,5,6] y) { y = Reshape(x, shape) }",
        shape=np.array([0, 5, 6]),
    )


def test_no_example_fits(tmp_path):
    with pytest.raises(LoadError, match="no example input fits") as caught:
        known(fixed(tmp_path), tmp_path)
    assert "give the shapes of its inputs" in str(caught.value)


def test_sizes_that_images_need(tmp_path):
    """The first example, of 64 and 96 pixels, does not fit; one of 224 and 256 does."""
    model = graph(
        """g (float[N,3,H,W] x) => (float[N,8,1,1] y) {
        h = Conv<strides = [32, 32]>(x, a)  p = Conv(h, b)  y = GlobalMaxPool(p) }""",
        a=weights(4, 3, 32, 32),
        b=weights(8, 4, 7, 7),
    )
    found = known(model, tmp_path)
    assert found["x"].shapes[0] == (2, 3, 224, 224)


def test_given_shapes(tmp_path):
    model = graph(
        "g (float[N,T,5] x, float[N,T] z) => (float[N,T,5] y) { y = Identity(x) }",
    )
    found = known(model, tmp_path, {"x": (4, 9, 5)})
    assert found["x"].shapes == ((4, 9, 5), (5, 10, 5))
    assert found["z"].shapes == ((4, 9), (5, 10))


def test_the_same_symbol_is_the_same_size(tmp_path):
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "n", 3]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, "n", 3]),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "n", 3])
    model = helper.make_model(
        helper.make_graph([helper.make_node("Add", ["x", "z"], ["y"])], "g", ends, [out]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    assert known(model, tmp_path)["y"].shapes == ((2, 2, 3), (3, 3, 3))


@pytest.mark.parametrize("groups", [1, 3])
def test_channels_that_a_file_leaves_open(tmp_path, groups):
    """Only the kernels say how many channels there are, for whatever comes before them."""
    model = graph(
        f"""g (float[n,c,h,w] x) => (float[n,k,p,q] y) {{
        s = Div(x, half)  u = Conv<group = {groups}>(s, a)  y = Relu(u) }}""",
        a=weights(6, 3 // groups, 3, 3),
        half=np.array(0.5, dtype=np.float32),
    )
    assert known(model, tmp_path)["y"].shapes == ((2, 6, 62, 62), (3, 6, 94, 94))


def test_a_model_with_open_channels_is_pruned(tmp_path):
    a, c = weights(6, 3, 1, 1), weights(4, 6, 1, 1)
    model = graph(
        """g (float[n,c,h,w] x) => (float[n,k,p,q] y) {
        u = Conv(x, a)  r = Relu(u)  y = Conv(r, c) }""",
        a=a,
        c=c,
    )
    x, keep = weights(2, 3, 5, 7, seed=3), [1, 4, 5]
    hidden = np.maximum(np.einsum("nchw,kc->nkhw", x, a[keep, :, 0, 0]), 0)
    wanted = np.einsum("nkhw,ok->nohw", hidden, c[:, keep, 0, 0])
    agree(model, tmp_path, {("a", 0): keep}, [wanted], x=x)
