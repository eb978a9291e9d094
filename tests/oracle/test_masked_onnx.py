"""The masked graph over a pruned axis, against numbers from the kept coordinates only."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import graphprune as gp
from graphprune.errors import GraphPruneError
from graphprune.frontends.onnx.load import load_onnx
from graphprune.frontends.onnx.read import read_onnx
from graphprune.oracle.masked_onnx import mask_onnx
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, planned, pruned, run, weights, written

KEEP = [1, 2, 5]  # of 8
X = weights(2, 3, 5, seed=9)
A, B, C = weights(5, 8), weights(8, seed=3), weights(8, 4)
H = X @ A[:, KEEP] + B[KEEP]


def masked(model, tmp_path, kept, **feeds):
    """Results of the masked graph, and of the slim one, which have to agree."""
    file = written(model, tmp_path)
    program = load_onnx(file, {n: v.shape for n, v in feeds.items()})
    plan = planned(program, kept)
    oracle = read_onnx(file)
    mask_onnx(oracle, program.known, program.typing, plan.bind(program).keep)
    onnx.save(ir.to_proto(oracle), tmp_path / "masked.onnx")
    certificate = verify_onnx(program, plan, SlimOnnx(program, plan))
    certificate.raise_if_failed()
    return run(tmp_path / "masked.onnx", **feeds)


def one(body, opset=17, out="N,3,1", kind="float", **arrays):
    """A layer of eight columns, and what is done with them."""
    text = f"g (float[N,3,5] x) => ({kind}[{out}] y) {{ m = MatMul(x, a)  h = Add(m, b)  {body} }}"
    return graph(text, opset=opset, a=A, b=B, **arrays)


def softmax(h, axis=-1):
    e = np.exp(h - h.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def logsumexp(h):
    return np.log(np.exp(h).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("call", "formula"),
    [("Softmax", softmax), ("LogSoftmax", lambda h: np.log(softmax(h)))],
)
def test_softmax(tmp_path, call, formula):
    model = one(f"s = {call}<axis = -1>(h)  y = MatMul(s, c)", out="N,3,4", c=C)
    (found,) = masked(model, tmp_path, {("a", 1): KEEP}, x=X)
    np.testing.assert_allclose(found, formula(H) @ C[KEEP], rtol=1e-4, atol=1e-5)


def test_old_softmax_is_over_all_that_follows(tmp_path):
    model = one("s = Softmax<axis = 1>(h)  y = MatMul(s, c)", opset=12, out="N,3,4", c=C)
    (found,) = masked(model, tmp_path, {("a", 1): KEEP}, x=X)
    flat = softmax(H.reshape(2, -1)).reshape(H.shape)
    np.testing.assert_allclose(found, flat @ C[KEEP], rtol=1e-4, atol=1e-5)


REDUCTIONS = {
    "ReduceMean": lambda h: h.mean(axis=-1, keepdims=True),
    "ReduceMax": lambda h: h.max(axis=-1, keepdims=True),
    "ReduceMin": lambda h: h.min(axis=-1, keepdims=True),
    "ReduceProd": lambda h: h.prod(axis=-1, keepdims=True),
    "ReduceSum": lambda h: h.sum(axis=-1, keepdims=True),
    "ReduceLogSumExp": logsumexp,
    "ReduceL1": lambda h: np.abs(h).sum(axis=-1, keepdims=True),
    "ReduceL2": lambda h: np.sqrt((h**2).sum(axis=-1, keepdims=True)),
    "ReduceSumSquare": lambda h: (h**2).sum(axis=-1, keepdims=True),
}


@pytest.mark.parametrize("opset", [12, 18])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(tmp_path, name, opset):
    """All of them give an output of the model itself."""
    if opset == 12:
        model = one(f"y = {name}<axes = [-1]>(h)", opset=12)
    else:
        model = one(f"y = {name}(h, axes)", opset=18, axes=np.array([2]))
    (found,) = masked(model, tmp_path, {("a", 1): KEEP}, x=X)
    np.testing.assert_allclose(found, REDUCTIONS[name](H), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", ["", "<axes = [1, 2], keepdims = 0>"])
def test_mean_over_several_axes(tmp_path, axes):
    out = "N" if axes else "1,1,1"
    model = one(f"y = ReduceMean{axes}(h)", opset=13, out=out)
    (found,) = masked(model, tmp_path, {("a", 1): KEEP}, x=X)
    wanted = H.mean(axis=(1, 2)) if axes else H.mean(keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_no_axes_may_mean_no_reduction(tmp_path):
    body = "r = ReduceMax<noop_with_empty_axes = 1>(h)  y = MatMul(r, c)"
    model = one(body, opset=18, out="N,3,4", c=C)
    (found,) = masked(model, tmp_path, {("a", 1): KEEP}, x=X)
    np.testing.assert_allclose(found, H @ C[KEEP], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ReduceMax", "ReduceMin"])
def test_any_and_all(tmp_path, name):
    """Over truth values the neutral elements are others than over numbers."""
    far = np.array(2.0 if name == "ReduceMax" else -2.0, np.float32)
    model = one(
        f"t = Greater(h, far)  y = {name}<keepdims = 1>(t, axes)",
        opset=20,
        kind="bool",
        far=far,
        axes=np.array([-1]),
    )
    file = written(model, tmp_path)
    program = load_onnx(file)
    plan = planned(program, {("a", 1): KEEP})
    oracle = read_onnx(file)
    mask_onnx(oracle, program.known, program.typing, plan.bind(program).keep)
    # ONNX Runtime has no reductions of truth values.
    (found,) = ReferenceEvaluator(ir.to_proto(oracle)).run(None, {"x": X})
    wanted = {"ReduceMax": np.any, "ReduceMin": np.all}[name](far < H, axis=-1, keepdims=True)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(tmp_path, bias):
    scale, shift = weights(8, seed=1), weights(8, seed=2)
    arrays = {"scale": scale, "shift": shift} if bias else {"scale": scale}
    call = f"n = LayerNormalization<epsilon = 0.001>(h, scale{', shift' if bias else ''})"
    model = one(f"{call}  y = MatMul(n, c)", out="N,3,4", c=C, **arrays)
    (found,) = masked(model, tmp_path, {("a", 1): KEEP}, x=X)
    n = (H - H.mean(axis=-1, keepdims=True)) / np.sqrt(H.var(axis=-1, keepdims=True) + 1e-3)
    n = n * scale[KEEP] + (shift[KEEP] if bias else 0)
    np.testing.assert_allclose(found, n @ C[KEEP], rtol=1e-4, atol=1e-5)


def test_layer_norm_within_pruned_heads(tmp_path):
    """Its shift would give removed heads a value, which a sum over heads would notice."""
    scale, shift = weights(2, seed=1), weights(2, seed=2)
    model = one(
        """r = Reshape(h, shape)  n = LayerNormalization(r, scale, shift)
        s = ReduceSum<keepdims = 0>(n, axes)  y = MatMul(s, d)""",
        out="N,3,4",
        shape=np.array([0, 0, 4, 2]),
        scale=scale,
        shift=shift,
        axes=np.array([2]),
        d=weights(2, 4),
    )
    (found,) = masked(model, tmp_path, {("a", 1, 4): [0, 3]}, x=X)
    rows = [0, 1, 6, 7]
    h = (X @ A[:, rows] + B[rows]).reshape(2, 3, 2, 2)
    n = (h - h.mean(axis=-1, keepdims=True)) / np.sqrt(h.var(axis=-1, keepdims=True) + 1e-5)
    wanted = (n * scale + shift).sum(axis=2) @ weights(2, 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_heads_and_widths_of_a_norm_together(tmp_path):
    scale, shift = weights(2, seed=1), weights(2, seed=2) + 1
    e = weights(5, 4, seed=4)
    model = graph(
        """g (float[N,3,5] x) => (float[N,3,3] y) {
        h = MatMul(x, a)  r = Reshape(h, shape)
        n = LayerNormalization(r, scale, shift)
        s = ReduceSum<keepdims = 0>(n, axes)  y = MatMul(s, d) }""",
        a=weights(5, 12),
        scale=weights(4, seed=1),
        shift=weights(4, seed=2) + 1,
        shape=np.array([0, 0, 3, 4]),
        axes=np.array([2]),
        d=weights(4, 3),
    )
    del scale, shift, e
    heads, dims = [0, 2], [0, 1, 3]
    (found,) = masked(model, tmp_path, {("a", 1, 3): heads, ("scale", 0): dims}, x=X)
    rows = [4 * i + j for i in heads for j in dims]
    h = (X @ weights(5, 12)[:, rows]).reshape(2, 3, 2, 3)
    n = (h - h.mean(axis=-1, keepdims=True)) / np.sqrt(h.var(axis=-1, keepdims=True) + 1e-5)
    n = n * weights(4, seed=1)[dims] + weights(4, seed=2)[dims] + 1
    np.testing.assert_allclose(found, n.sum(axis=2) @ weights(4, 3)[dims], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["groups", "channels"])
@pytest.mark.parametrize("instance", [False, True])
def test_group_norm(tmp_path, what, instance):
    """Whole groups, or as many channels of each; exporters write InstanceNormalization too."""
    scale, shift = weights(8, seed=1), weights(8, seed=2)
    a, c = weights(8, 3, 1, 1), weights(2, 8, 1, 1)
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    apart = """r = Reshape(h, groups)  i = InstanceNormalization(r, one, zero)
        sh = Shape(h)  b = Reshape(i, sh)  m = Mul(b, scale)  n = Add(m, shift)"""
    plain = "n = GroupNormalization<num_groups = 4>(h, scale, shift)"
    arrays = {"a": a, "c": c, "scale": scale, "shift": shift}
    if instance:
        arrays |= {"one": one, "zero": zero, "groups": np.array([0, 4, -1])}
        arrays |= {"scale": scale[:, None, None], "shift": shift[:, None, None]}
    model = graph(
        f"""g (float[N,3,4,4] x) => (float[N,2,4,4] y) {{
        h = Conv(x, a)  {apart if instance else plain}  y = Conv(n, c) }}""",
        opset=21,
        ir_version=10,
        **arrays,
    )
    x = weights(2, 3, 4, 4)
    places, kept = ([0, 1, 6, 7], [0, 3]) if what == "groups" else ([1, 3, 5, 7], [1])
    (found,) = masked(model, tmp_path, {("a", 0, 4 if what == "groups" else 2): kept}, x=x)
    h = np.einsum("nihw,oi->nohw", x, a[places, :, 0, 0])
    h = h.reshape(2, 2 if what == "groups" else 4, -1)
    n = (h - h.mean(axis=-1, keepdims=True)) / np.sqrt(h.var(axis=-1, keepdims=True) + 1e-5)
    s, t = (v[places][:, None, None] for v in (scale, shift))
    n = n.reshape(2, len(places), 4, 4) * s + t
    wanted = np.einsum("nihw,oi->nohw", n, c[:, places, 0, 0])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_arg_max_chooses_among_what_is_kept(tmp_path):
    """A router: its places are looked up in tables that lose the same rows."""
    table = weights(8, 4)
    model = one(
        "i = ArgMax<axis = -1, keepdims = 0>(h)  y = Gather(table, i)", out="N,3,4", table=table
    )
    (found,) = masked(model, tmp_path, {("a", 1): KEEP}, x=X)
    np.testing.assert_allclose(found, table[KEEP][H.argmax(axis=-1)], rtol=1e-4)


@pytest.mark.parametrize("largest", [0, 1])
def test_top_k_values(tmp_path, largest):
    model = one(f"y, i = TopK<axis = -1, largest = {largest}>(h, k)", out="N,3,2", k=np.array([2]))
    (found,) = masked(model, tmp_path, {("a", 1): KEEP}, x=X)
    wanted = np.sort(H, axis=-1)
    wanted = wanted[..., ::-1][..., :2] if largest else wanted[..., :2]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_half_precision(tmp_path):
    """The lowest number is of the type; float32's would be an infinity."""
    half = np.float16
    model = graph(
        """g (float16[N,3,5] x) => (float16[N,3,4] y) {
        h = MatMul(x, a)  s = Softmax(h)  y = MatMul(s, c) }""",
        a=A.astype(half),
        c=C.astype(half),
    )
    file = written(model, tmp_path)
    program = load_onnx(file)
    plan = planned(program, {("a", 1): KEEP})
    certificate = verify_onnx(program, plan, SlimOnnx(program, plan), tolerance=5e-3)
    certificate.raise_if_failed()


def test_the_mean_of_integers_is_refused(tmp_path):
    model = one("i = Cast<to = 7>(h)  y = ReduceMean<axes = [2]>(i)", kind="int64")
    program = load_onnx(written(model, tmp_path))
    plan = planned(program, {("a", 1): KEEP})
    with pytest.raises(GraphPruneError, match="mean of integers"):
        verify_onnx(program, plan, SlimOnnx(program, plan))


def test_statistics_of_a_norm_that_are_read_are_refused(tmp_path):
    model = one(
        "n, mean = LayerNormalization(h, b)  s = MatMul(n, c)  y = Add(s, mean)",
        out="N,3,4",
        c=C,
    )
    program = load_onnx(written(model, tmp_path))
    plan = planned(program, {("a", 1): KEEP})
    with pytest.raises(GraphPruneError, match="statistics of LayerNormalization"):
        verify_onnx(program, plan, SlimOnnx(program, plan))


def two_layers():
    return graph(
        """g (float[N,5] x) => (float[N,4] y) {
        m = MatMul(x, a)  h = Add(m, b)  r = Sigmoid(h)  y = MatMul(r, c) }""",
        a=A,
        b=B,
        c=C,
    )


@pytest.mark.parametrize("wrong", ["a", "b", "c"])
def test_a_slim_model_cut_at_other_places_fails(tmp_path, wrong):
    slim = pruned(two_layers(), tmp_path, {("a", 1): KEEP})
    program = load_onnx(tmp_path / "dense.onnx")
    plan = planned(program, {("a", 1): KEEP})
    model = onnx.load(slim)
    for tensor in model.graph.initializer:
        if tensor.name == wrong:
            whole = {"a": A, "b": B, "c": C}[wrong]
            cut = whole[:, [1, 2, 6]] if wrong == "a" else whole[[1, 2, 6]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(cut), wrong))
    onnx.save(model, slim)
    certificate = verify_onnx(program, plan, slim)
    assert not certificate.passed
    assert certificate.failed_output == "y"
    with pytest.raises(GraphPruneError, match="does not compute"):
        certificate.raise_if_failed()


def test_the_slim_model_of_another_plan_fails(tmp_path):
    program = load_onnx(written(two_layers(), tmp_path))
    plan, other = (planned(program, {("a", 1): rows}) for rows in (KEEP, [0, 2, 5]))
    assert not verify_onnx(program, plan, SlimOnnx(program, other)).passed
    assert verify_onnx(program, other, SlimOnnx(program, other)).passed


def test_a_slim_model_with_an_output_of_another_shape_fails(tmp_path):
    program = load_onnx(written(two_layers(), tmp_path))
    plan = planned(program, {("a", 1): KEEP})
    model = graph("g (float[N,5] x) => (float[N,3] y) { y = MatMul(x, a) }", a=A[:, :3])
    other = written(model, tmp_path, "other.onnx")
    certificate = verify_onnx(program, plan, other)
    assert not certificate.passed
    assert certificate.problem is not None


def test_a_plan_of_another_model(tmp_path):
    program = load_onnx(written(two_layers(), tmp_path))
    plan = planned(program, {("a", 1): KEEP})
    other = load_onnx(
        written(one("y = MatMul(h, c)", out="N,3,4", c=weights(8, 6)[:, :4]), tmp_path, "o.onnx")
    )
    with pytest.raises(gp.GraphPruneError):
        SlimOnnx(other, gp.Plan("0" * 16, plan.kept_units, plan.sizes))


def test_pruning_that_makes_some_outputs_nan_fails(tmp_path):
    """Slim and masked agree on the NaN, where the dense model has a number."""
    a = np.zeros((5, 8), np.float32)
    a[0] = [1 if unit in KEEP else -1 for unit in range(8)]
    model = graph(
        """g (float[16,5] x) => (float[16,3] y) {
        h = MatMul(x, a)  r = Relu(h)  s = ReduceSum<keepdims = 1>(r, last)
        q = Div(r, s)  y = MatMul(q, c) }""",
        a=a,
        c=weights(8, 3),
        last=np.array([1]),
    )
    program = load_onnx(written(model, tmp_path))
    plan = planned(program, {("a", 1): KEEP})
    certificate = verify_onnx(program, plan, SlimOnnx(program, plan))
    assert not certificate.passed
    assert "NaN" in certificate.problem
