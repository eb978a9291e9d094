"""Which initialisers of an ONNX graph are treated, and how they are stacks of matrices."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from graphprune.errors import PlanError
from graphprune.streaming import Bank, Convolution, Matrix, batches, find_sites, stream
from onnx_graphs import fused, graph, weights
from streaming.onnx_oracle import Looking, images, program_of

# Each operator `y = ...` reads x and w: the shapes of both, attributes, and how rows of the result
# are those of the product. B is a batch of two.
MATRICES = {
    "right": ("MatMul (x, w)", (2, 5, 6), (6, 4), -1),
    "right of a vector": ("MatMul (x, w)", (6,), (6, 4), -1),
    "left": ("MatMul (w, x)", (2, 6, 5), (4, 6), -2),
    "left of a vector": ("MatMul (w, x)", (6,), (4, 6), -1),
    "gemm": ("Gemm (x, w)", (5, 6), (6, 4), -1),
    "gemm, b transposed": ("Gemm <transB = 1> (x, w)", (5, 6), (4, 6), -1),
    "gemm, a transposed": ("Gemm <transA = 1> (x, w)", (6, 5), (6, 4), -1),
    "gemm, both": ("Gemm <transA = 1, transB = 1> (x, w)", (6, 5), (4, 6), -1),
    "gemm, from the left": ("Gemm (w, x)", (6, 5), (4, 6), -2),
    "gemm, from the left, both": ("Gemm <transA = 1, transB = 1> (w, x)", (5, 6), (6, 4), -2),
    "fused": ("ort.FusedMatMul (x, w)", (2, 5, 6), (6, 4), -1),
    "fused, b transposed": ("ort.FusedMatMul <transB = 1> (x, w)", (2, 5, 6), (4, 6), -1),
    "fused, a transposed": ("ort.FusedMatMul <transA = 1> (x, w)", (2, 6, 5), (6, 4), -1),
    "fused, from the left": ("ort.FusedMatMul <transA = 1> (w, x)", (2, 6, 5), (6, 4), -2),
    "bank": ("MatMul (x, w)", (3, 5, 6), (3, 6, 4), -1),
    "bank from the left": ("MatMul (w, x)", (3, 6, 5), (3, 4, 6), -2),
}


def single(text, x, w):
    """A model of one product and something behind it."""
    shape = ", ".join(map(str, x))
    return fused(
        f"m (float[{shape}] x) => (float z) {{ y = {text} z = ReduceSum <keepdims = 0> (y) }}",
        w=weights(*w),
    )


def seen(program, data):
    """What a treatment sees of w."""
    treatment = Looking()
    sites = find_sites(program, every=True)
    stream(program, sites, batches(program, data), treatment)
    return treatment.layouts["w"], [observer.rows for observer in treatment.observers["w"]]


def result(model, feeds):
    """y, by ONNX Runtime."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.graph.output[:]
    whole.graph.output.append(onnx.ValueInfoProto(name="y"))
    session = onnxruntime.InferenceSession(
        whole.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("name", MATRICES)
def test_rows_times_matrices_are_what_the_operator_computes(name, tmp_path):
    text, x, w, features = MATRICES[name]
    model = single(text, x, w)
    program = program_of(model, tmp_path)
    data = {"x": weights(*x, seed=3)}
    layout, rows = seen(program, [data])
    y = torch.from_numpy(result(model, data))
    y = y.movedim(features, -1) if y.dim() > 1 else y
    parts = y if len(w) == 3 else [y]
    matrices = layout.matrices(program.weights["w"])
    assert len(rows) == len(matrices) == layout.parts == (w[0] if len(w) == 3 else 1)
    for part, matrix, expected in zip(rows, matrices, parts, strict=True):
        found = (part @ matrix.T).reshape(expected.shape)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    new = layout.restored(matrices, program.weights["w"].shape)
    assert torch.equal(new, program.weights["w"])
    kind = Bank if len(w) == 3 else Matrix
    assert isinstance(layout, kind)


CONVOLUTIONS = {
    "plain": ("kernel_shape = [3, 3]", (4, 6, 3, 3), (1, 6, 8, 9)),
    "groups": ("group = 3", (9, 2, 3, 2), (2, 6, 8, 9)),
    "asymmetric": ("pads = [0, 1, 2, 3], strides = [2, 1]", (4, 6, 3, 3), (1, 6, 8, 9)),
    "dilated": ("dilations = [1, 2], group = 2", (4, 3, 3, 3), (1, 6, 8, 9)),
    "same upper": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (4, 6, 3, 4), (1, 6, 8, 9)),
    "same lower": ('auto_pad = "SAME_LOWER", strides = [2, 3]', (4, 6, 2, 2), (1, 6, 9, 9)),
    "valid": ('auto_pad = "VALID"', (4, 6, 3, 3), (1, 6, 8, 9)),
    "1d": ("strides = [2], pads = [1, 0]", (4, 6, 3), (2, 6, 9)),
    "3d": ("pads = [1, 0, 0, 0, 0, 1]", (4, 2, 2, 2, 3), (1, 2, 4, 5, 6)),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "Conv") for n in CONVOLUTIONS), ("asymmetric", "ort.FusedConv")]
)
def test_patches_times_kernels_are_what_a_convolution_computes(name, kind, tmp_path):
    attributes, w, x = CONVOLUTIONS[name]
    model = single(f"{kind} <{attributes}> (x, w)", x, w)
    program = program_of(model, tmp_path)
    data = {"x": weights(*x, seed=3)}
    layout, rows = seen(program, [data])
    assert isinstance(layout, Convolution)
    y = torch.from_numpy(result(model, data))
    matrices = layout.matrices(program.weights["w"])
    outputs = y.movedim(1, -1).reshape(-1, layout.groups, w[0] // layout.groups)
    for part in range(layout.groups):
        torch.testing.assert_close(
            rows[part] @ matrices[part].T, outputs[:, part], rtol=1e-5, atol=1e-5
        )


def test_weights_are_followed_through_copies(tmp_path):
    model = graph(
        """m (float[2, 5, 6] x) => (float z) {
            a = Identity (w)
            b = Transpose (a)
            s = Constant <value = int64[2] {6, 4}> ()
            c = Reshape (b, s)
            y = MatMul (x, c)
            z = ReduceSum <keepdims = 0> (y)
        }""",
        w=weights(4, 6),
    )
    program = program_of(model, tmp_path)
    layout, (rows,) = seen(program, [{"x": weights(2, 5, 6, seed=3)}])
    assert layout == Matrix(transposed=False)
    y = torch.from_numpy(result(model, {"x": weights(2, 5, 6, seed=3)}))
    torch.testing.assert_close(rows @ program.weights["w"].T, y.reshape(-1, 4))


def test_a_weight_in_half_precision_that_is_cast(tmp_path):
    model = graph(
        """m (float[2, 5, 6] x) => (float z) {
            c = Cast <to = 1> (w)
            y = MatMul (x, c)
            z = ReduceSum <keepdims = 0> (y)
        }""",
        w=weights(6, 4).astype(np.float16),
    )
    program = program_of(model, tmp_path)
    layout, _ = seen(program, [{"x": weights(2, 5, 6, seed=3)}])
    assert layout == Matrix(transposed=True)


REFUSED = {
    "table": ("i = Cast <to = 7> (x) y = Gather (w, i)", (6, 4), "a table that Gather looks up"),
    "sum": ("y = Add (x, w)", (5, 6), "Add reads it too"),
    "two uses": (
        "a = MatMul (x, w) t = Transpose (x) b = MatMul (t, a) y = Add (b, w)", (6, 6),
        "Add reads it too",
    ),
    "transposed convolution": (
        "a = Unsqueeze (x, one) y = ConvTranspose (a, w)", (5, 4, 3), "a transposed convolution",
    ),
    "table of a loop": (
        """c = Constant <value = bool {1}> ()
           y = If (c) <
             then_branch = t () => (float[5, 4] a) { a = MatMul (x, w) },
             else_branch = e () => (float[5, 4] b) { b = MatMul (x, w) }>""",
        (6, 4), "inside of If, Loop or Scan",
    ),
    "itself": ("y = MatMul (w, w)", (6, 6), "itself"),
    "batch": ("a = Unsqueeze (x, one) y = MatMul (a, w)", (3, 6, 4), "spreads it over a batch"),
    "other matrices": (
        "a = MatMul (x, w) t = Transpose (w) y = MatMul (a, t)", (6, 6),
        "its uses take it for different matrices",
    ),
    "reshaped": (
        "s = Constant <value = int64[2] {6, 4}> () r = Reshape (w, s) y = MatMul (x, r)",
        (4, 6), "Reshape reads it too",
    ),
    "fake quantised": (
        """q = QuantizeLinear (w, scale, zero) d = DequantizeLinear (q, scale, zero)
           y = MatMul (x, d)""",
        (6, 4), "it is quantised before it is used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_product_alone_is_left_with_a_reason(name, tmp_path):
    text, shape, reason = REFUSED[name]
    model = graph(
        f"""m (float[5, 6] x) => (float z) {{
            {text}
            p = MatMul (x, other)
            sum1 = ReduceSum <keepdims = 0> (p)
            sum2 = ReduceSum <keepdims = 0> (y)
            z = Add (sum1, sum2)
        }}""",
        w=weights(*shape),
        other=weights(6, 3),
        one=np.array([0]),
        scale=np.float32(0.1),
        zero=np.int8(0),
    )
    sites = find_sites(program_of(model, tmp_path), every=True)
    assert sites.parameters == ("other",)
    assert reason in sites.skipped["w"]


def test_quantised_weights_are_left(tmp_path):
    model = graph(
        """m (float[5, 6] x) => (float z) {
            d = DequantizeLinear (w, scale, zero)
            y = MatMul (x, d)
            p = MatMul (x, other)
            q = ReduceSum <keepdims = 0> (p)
            r = ReduceSum <keepdims = 0> (y)
            z = Add (q, r)
        }""",
        w=(weights(6, 4) * 10).astype(np.int8),
        other=weights(6, 3),
        scale=np.float32(0.1),
        zero=np.int8(0),
    )
    sites = find_sites(program_of(model, tmp_path), every=True)
    assert sites.skipped["w"] == "it is quantised"


def test_padding_that_depends_on_the_image_is_not_guessed(tmp_path):
    def model(rows):
        return graph(
            f"""m (float[1, 3, {rows}, {rows}] x) => (float z) {{
                y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)
                p = Conv <auto_pad = "SAME_UPPER"> (x, v)
                q = ReduceSum <keepdims = 0> (p)
                r = ReduceSum <keepdims = 0> (y)
                z = Add (q, r)
            }}""",
            w=weights(4, 3, 3, 3),
            v=weights(4, 3, 3, 3, seed=1),
        )

    (tmp_path / "open").mkdir()
    sites = find_sites(program_of(model("h"), tmp_path / "open"), every=True)
    assert sites.parameters == ("v",)
    assert "depends on the size of the image" in sites.skipped["w"]
    assert set(find_sites(program_of(model(9), tmp_path), every=True).parameters) == {"v", "w"}


SCOPE = """m (float[b, 6] x) => (float[b, 6] z, float[b, 1] value, int64[b, 2] best) {
    h = MatMul (x, first)
    half = Constant <value = float {0.5}> ()
    e = Erf (h)
    g = Mul (h, e)
    a = Mul (g, half)
    c = MatMul (a, middle)
    n = LayerNormalization (c, scale, shift)
    r = Add (n, x)
    logits = MatMul (r, router)
    shifted = Add (logits, correction)
    p = Softmax (shifted)
    k = Constant <value = int64[1] {2}> ()
    top, best = TopK (p, k)
    weight = ReduceSum (top, one)
    scaled = Mul (r, weight)
    v = Gemm <transB = 1> (scaled, single)
    value = Tanh (v)
    y = MatMul (scaled, head)
    biased = Add (y, bias)
    e2 = Erf (biased)
    z = Mul (biased, e2)
}"""


def test_routers_outputs_and_single_outputs_are_left_unless_named(tmp_path):
    model = graph(
        SCOPE,
        first=weights(6, 8),
        middle=weights(8, 6),
        router=weights(6, 4),
        single=weights(1, 6),
        head=weights(6, 6),
        scale=weights(6),
        shift=weights(6, seed=1),
        correction=weights(4),
        bias=weights(6, seed=2),
        one=np.array([1]),
    )
    program = program_of(model, tmp_path)
    sites = find_sites(program)
    assert sites.parameters == ("first", "middle")
    assert sites.skipped == {
        "router": "a router",
        "single": "its result is an output of the model",
        "head": "its result is an output of the model",
    }
    assert set(find_sites(program, ["head", "router"]).parameters) == {"head", "router"}
    assert find_sites(program, exclude=["f*"]).parameters == ("middle",)
    with pytest.raises(PlanError, match="nothing that 'scale' matches"):
        find_sites(program, include=["scale"])
    with pytest.raises(PlanError, match="no parameter matches"):
        find_sites(program, exclude=["nothing"])


def test_depthwise_kernels_are_left(tmp_path):
    model = graph(
        """m (float[1, 6, 8, 8] x) => (float[1, 6, 4, 4] z) {
            a = Conv <group = 6> (x, depth)
            b = Conv (a, point)
            c = Relu (b)
            z = Conv (c, last)
        }""",
        depth=weights(6, 1, 3, 3),
        point=weights(6, 6, 1, 1),
        last=weights(6, 6, 3, 3),
    )
    sites = find_sites(program_of(model, tmp_path))
    assert sites.parameters == ("point",)
    assert sites.skipped["depth"] == "a depthwise convolution"


def test_weights_that_read_one_value_share_its_statistic(tmp_path):
    model = graph(
        """m (float[b, n, 6] x) => (float z) {
            i = Identity (x)
            s = Constant <value = int64[2] {-1, 6}> ()
            r = Reshape (x, s)
            q = MatMul (i, wq)
            k = Gemm <transB = 1> (r, wk)
            t = Transpose <perm = [0, 2, 1]> (x)
            v = MatMul (wv, t)
            a = ReduceSum <keepdims = 0> (q)
            c = ReduceSum <keepdims = 0> (k)
            d = ReduceSum <keepdims = 0> (v)
            z = Sum (a, c, d)
        }""",
        wq=weights(6, 4),
        wk=weights(4, 6),
        wv=weights(4, 6, seed=1),
    )
    groups = find_sites(program_of(model, tmp_path), every=True).groups
    assert [g.parameters for g in groups] == [("wq", "wk"), ("wv",)]
    assert [g.sites[0].reads for g in groups] == ["x", "t"]


def test_attention_of_onnx_runtime_multiplies_by_its_weight(tmp_path):
    model = fused(
        """m (float[1, 5, 8] x) => (float z) {
            y = ort.Attention <num_heads = 2> (x, w, bias)
            z = ReduceSum <keepdims = 0> (y)
        }""",
        w=weights(8, 24),
        bias=weights(24),
    )
    program = program_of(model, tmp_path)
    data = images(5, 8)
    layout, (rows,) = seen(program, data)
    assert layout == Matrix(transposed=True)
    assert torch.equal(rows, torch.cat([torch.from_numpy(d["x"][0]) for d in data]))


def test_the_numbers_of_a_model_are_not_changed_by_finding_sites(tmp_path):
    model = single("MatMul (x, w)", (2, 5, 6), (6, 4))
    program = program_of(model, tmp_path)
    find_sites(program, every=True)
    (tensor,) = model.graph.initializer
    assert np.array_equal(program.weights["w"].numpy(), numpy_helper.to_array(tensor))
