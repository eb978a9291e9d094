"""The operator graphprune::BitmapLinear: its kernel, its function, and the reference agree."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphprune.kernels import native, onnx_function
from graphprune.kernels.formats.bitmap import Bitmap
from kernels.native_build import library
from kernels.onnx_bitmap import model, run, run_reference, session

__all__ = ["library"]


def weight(rows, columns, density, seed=0):
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=draw) < density
    return torch.randn(rows, columns, generator=draw) * kept


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).numpy()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    st.booleans(),
)
def test_three_ways_are_equal(library, rows, columns, count, density, biased):
    dense = weight(rows, columns, density)
    bias = tokens(rows) if biased else None
    made, x = model(Bitmap.pack(dense), bias), tokens(count, columns)
    expected = x.astype(np.float64) @ dense.double().numpy().T + (0 if bias is None else bias)
    before = native.onnxruntime_calls()
    answers = {
        "the function": run(made, x),
        "the reference": run_reference(made, x),
    }
    assert native.onnxruntime_calls() == before
    answers["the kernel"] = run(made, x, library)
    assert native.onnxruntime_calls() == before + 1
    for way, y in answers.items():
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4, err_msg=way)


@pytest.mark.parametrize("density", [0.0, 0.4])
def test_the_function_is_decoded_when_a_model_is_loaded(tmp_path, density):
    made = model(Bitmap.pack(weight(32, 41, density)))
    session(made, optimized=tmp_path / "optimised.onnx")
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    assert [node.op_type for node in graph.node] == ["MatMul"]
    (kept,) = [item for item in graph.initializer if item.name == graph.node[0].input[1]]
    assert list(kept.dims) == [41, 32]


def test_the_kernel_keeps_the_node(library, tmp_path):
    made = model(Bitmap.pack(weight(32, 41, 0.4)))
    session(made, library, optimized=tmp_path / "optimised.onnx")
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    assert [node.op_type for node in graph.node] == ["BitmapLinear"]


def test_the_kernel_needs_no_function(library):
    dense = weight(16, 24, 0.5)
    x = tokens(2, 3, 24)
    made = model(Bitmap.pack(dense), with_function=False)
    made.graph.input[0].type.tensor_type.shape.CopyFrom(
        helper.make_tensor_type_proto(TensorProto.FLOAT, ["batch", "tokens", 24]).tensor_type.shape
    )
    made.graph.output[0].type.tensor_type.ClearField("shape")
    y = run(made, x, library)
    np.testing.assert_allclose(y, x @ dense.numpy().T, rtol=1e-5, atol=1e-5)


def test_threads_of_the_session_change_nothing(library):
    made, x = model(Bitmap.pack(weight(1000, 999, 0.5))), tokens(3, 999)
    one, two = (run(made, x, library, threads) for threads in (1, 2))
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("dtype", "elements", "near"),
    [
        (torch.float16, TensorProto.FLOAT16, 2e-3),
        (torch.bfloat16, TensorProto.BFLOAT16, 2e-2),
    ],
)
def test_half_precision(library, dtype, elements, near):
    """Cast around the node, as numpy doesn't know bfloat16."""
    dense, x = weight(48, 100, 0.5).to(dtype), tokens(4, 100)
    inner = onnx_function.node("half", "w", "product")
    to_half = helper.make_node("Cast", ["x"], ["half"], to=elements)
    back = helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT)
    made = model(Bitmap.pack(dense))
    del made.graph.node[:]
    made.graph.node.extend([to_half, inner, back])
    y = run(made, x, library)
    expected = torch.from_numpy(x).to(dtype).double() @ dense.double().T
    np.testing.assert_allclose(y, expected.numpy(), rtol=near, atol=near)


BAD = {
    "row_offsets that begin later": ("row_offsets", lambda t: t + 1, "row_offsets of row 0"),
    "row_offsets that lie": ("row_offsets", lambda t: t * 1000, "row_offsets of row 0"),
    "negative row_offsets": ("row_offsets", lambda t: -t, "row_offsets of row 0"),
    "too few row_offsets": ("row_offsets", lambda t: t[1:], "the size of row_offsets"),
    "too few values": ("values", lambda t: t[:-1], "bits of row 15|row_offsets of row 15"),
    "no values": ("values", lambda t: t[:0], "row_offsets of row 0"),
    "more bits": ("bitmask", lambda t: t | 1, "bits of row"),
    "bits behind the columns": ("bitmask", lambda t: t | 128, "bits of row 0"),
    "a narrow bitmask": ("bitmask", lambda t: t[:, 1:], "the size of bitmask"),
    "a shape of another weight": ("shape", lambda t: (t[0], 50), "the size of bitmask"),
    "a negative shape": ("shape", lambda t: (-1, t[1]), "shape doesn't suit"),
}


@pytest.mark.parametrize("name", BAD)
def test_corrupt_weights_are_refused_when_loaded(library, name):
    field, change, match = BAD[name]
    parts = vars(Bitmap.pack(weight(16, 22, 0.5))).copy()
    parts[field] = change(parts[field])
    shape = parts["shape"]
    made = model(Bitmap(**{**parts, "shape": (16, 22)}))
    for item in made.graph.initializer:
        if item.name == "w.shape":
            item.CopyFrom(helper.make_tensor("w.shape", TensorProto.INT64, [2], shape))
    with pytest.raises(Exception, match=match):
        session(made, library)


def test_weights_that_come_as_inputs_are_checked_at_every_call(library):
    packed = Bitmap.pack(weight(16, 22, 0.5))
    made = model(packed)
    offsets = next(item for item in made.graph.initializer if item.name == "w.row_offsets")
    made.graph.initializer.remove(offsets)
    made.graph.input.append(helper.make_tensor_value_info("w.row_offsets", TensorProto.INT64, [16]))
    opened, x, good = session(made, library), tokens(2, 22), packed.row_offsets.numpy()
    opened.run(None, {"x": x, "w.row_offsets": good})
    good[3] += 100  # in the same place
    with pytest.raises(Exception, match="row_offsets of row"):
        opened.run(None, {"x": x, "w.row_offsets": good})


def test_other_tokens_are_refused(library):
    made = model(Bitmap.pack(weight(16, 22, 0.5)))
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    with pytest.raises(Exception, match="isn't the 22 columns"):
        run(made, tokens(2, 21), library)


def test_two_sessions_share_the_library(library):
    dense = weight(64, 64, 0.5)
    made, x = model(Bitmap.pack(dense)), tokens(1, 64)
    first, second = session(made, library), session(made, library)
    del first
    np.testing.assert_allclose(second.run(None, {"x": x})[0], x @ dense.numpy().T, atol=1e-4)
    np.testing.assert_allclose(run(made, x, library), x @ dense.numpy().T, atol=1e-4)


def test_later_opsets():
    made = onnx_function.function(21)
    assert {item.domain: item.version for item in made.opset_import} == {"": 21}
