"""What a slim file says beside its operators: versions, inputs, shapes and annotations are true."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser, shape_inference

import graphprune as gp
from graphprune.frontends.onnx.read import OLDEST_OPSET
from onnx_graphs import graph, initialisers, planned, run, weights, written

KEEP = [0, 2, 3, 6]
A, C, X = weights(5, 8), weights(8, 3), weights(4, 5, seed=9)
EXPECTED = np.maximum(X @ A[:, KEEP], 0) @ C[KEEP]
NEWEST_OPSET = onnx.defs.onnx_opset_version()
HEAD = "g (float[N,5] x) => (float[N,3] y)"
TEXT = f"{HEAD} {{ h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }}"


def listed(model):
    """The model with its initialisers among its inputs, which versions before 4 ask for."""
    for tensor in model.graph.initializer:
        entry = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(entry)
    return model


def slimmed(model, folder, kept=None):
    """The slim file of a valid model, checked by onnx and compared with the masked model."""
    onnx.checker.check_model(model, full_check=True)
    program = gp.load(written(model, folder))
    plan = planned(program, kept or {("a", 1): KEEP})
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim).raise_if_failed()
    slim.save(folder / "slim.onnx")
    onnx.checker.check_model(str(folder / "slim.onnx"), full_check=True)
    return onnx.load(folder / "slim.onnx")


def shapes(values):
    """Names to what is known of their dimensions."""
    found = {}
    for value in values:
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            found[value.name] = [d.dim_value for d in kind.shape.dim]
    return found


def check_shapes(model):
    """See that a file says of no value what inference from its operators contradicts."""
    said = shapes(model.graph.value_info)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    known = shapes(shape_inference.infer_shapes(bare, strict_mode=True).graph.value_info)
    known |= {name: list(array.shape) for name, array in initialisers(model).items()}
    assert said == {name: known[name] for name in said}


@pytest.mark.parametrize("opset", [OLDEST_OPSET, 13, NEWEST_OPSET])
@pytest.mark.parametrize("ir_version", range(3, onnx.IR_VERSION + 1))
def test_every_version_of_the_format(tmp_path, ir_version, opset):
    model = listed(graph(TEXT, opset, ir_version, a=A, c=C))
    for name, sizes in {"h": ["N", 8], "r": ["N", 8]}.items():
        entry = helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
        model.graph.value_info.append(entry)
    slim = slimmed(model, tmp_path)
    assert slim.ir_version == max(ir_version, 4)
    assert [(o.domain, o.version) for o in slim.opset_import] == [("", opset)]
    assert [value.name for value in slim.graph.input] == ["x"]
    assert {name: array.shape for name, array in initialisers(slim).items()} == {
        "a": (5, 4),
        "c": (4, 3),
    }
    check_shapes(slim)
    if opset < NEWEST_OPSET:  # ONNX Runtime may be older than the onnx package
        (found,) = run(tmp_path / "slim.onnx", x=X)
        np.testing.assert_allclose(found, EXPECTED, rtol=1e-4, atol=1e-5)


def test_a_file_of_version_3_whose_weights_become_zero(tmp_path):
    file = written(listed(graph(TEXT, 11, 3, a=A, c=C)), tmp_path)
    recipe = {"sparsify": {"method": "magnitude", "sparsity": 0.5}}
    gp.compile(file, recipe, tmp_path / "out" / "sparse.onnx")
    onnx.checker.check_model(str(tmp_path / "out" / "sparse.onnx"), full_check=True)


def test_a_kept_initialiser_that_is_returned_and_listed(tmp_path):
    text = TEXT.replace("(float[N,3] y)", "(float[N,3] y, float[2] s)")
    model = listed(graph(text, 11, 3, a=A, c=C, s=np.array([1, 2], np.float32)))
    slimmed(model, tmp_path)
    found, same = run(tmp_path / "slim.onnx", x=X)
    np.testing.assert_allclose(found, EXPECTED, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(same, [1, 2])


def sized(opset):
    """Operators that the rewrite gives other sizes, in the form that an opset has for them."""
    new = opset >= 13
    arrays = {"a": A, "c": weights(2, 3), "shape": np.array([0, 1, 8]), "one": np.array([1]),
              "halves": np.array([4, 4]), "starts": np.array([0]), "ends": np.array([4]),
              "axes": np.array([-1])}  # fmt: skip
    squeeze = "Squeeze(q, one)" if new else "Squeeze<axes = [1]>(q)"
    split = "Split<axis = 1>(t, halves)" if new else "Split<axis = 1, split = [4, 4]>(t)"
    if opset >= 18:
        split = "Split<axis = 1, num_outputs = 2>(t)"
    body = (
        f"h = MatMul(x, a)  q = Reshape(h, shape)  t = {squeeze}  u, v = {split}  "
        "w = Concat<axis = 1>(v, u)  b = Slice(w, starts, ends, axes)  r = Relu(b)  "
    )
    arrays["c"] = weights(4, 3)
    used = {n: v for n, v in arrays.items() if n != "halves" or 13 <= opset < 18}
    return graph(f"{HEAD} {{ {body} y = MatMul(r, c) }}", opset, 8, **{
        n: v for n, v in used.items() if n != "one" or new})  # fmt: skip


@pytest.mark.parametrize("opset", range(OLDEST_OPSET, NEWEST_OPSET + 1))
def test_operators_stay_in_the_form_of_their_opset(tmp_path, opset):
    kept = {("c", 0, 4): [0, 3]}  # of both halves
    slim = slimmed(sized(opset), tmp_path, kept)
    assert [o.version for o in slim.opset_import] == [opset]
    check_shapes(slim)
    if opset < NEWEST_OPSET:
        (found,) = run(tmp_path / "slim.onnx", x=X)
        expected = np.maximum(X @ A[:, [4, 7]], 0) @ weights(4, 3)[[0, 3]]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def annotate(model, tensor, scale):
    entry = model.graph.quantization_annotation.add(tensor_name=tensor)
    entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=scale)


def test_annotations_of_what_stays_stay(tmp_path):
    """Others would name tensors that are gone, or be about ones that have other channels."""
    text = TEXT.replace("y = MatMul(r, c)", "p = MatMul(r, c)  y = Mul(p, s)")
    model = graph(text, a=A, c=C, s=np.full(3, 2, np.float32), gone=np.ones(8, np.float32))
    annotate(model, "p", "s")
    annotate(model, "a", "s")
    annotate(model, "h", "gone")
    annotate(model, "y", "gone")
    slim = slimmed(model, tmp_path)
    assert [entry.tensor_name for entry in slim.graph.quantization_annotation] == ["p"]
    (found,) = run(tmp_path / "slim.onnx", x=X)
    np.testing.assert_allclose(found, 2 * EXPECTED, rtol=1e-4, atol=1e-5)


def test_shardings_of_what_is_cut_are_dropped(tmp_path):
    model = graph(TEXT, 21, min(11, onnx.IR_VERSION), a=A, c=C)
    if not hasattr(model, "configuration"):
        pytest.skip("this version of onnx knows no devices")
    model.configuration.add(name="pair", num_devices=2)
    for node, name, axis, size in ((0, "a", 1, 8), (2, "c", 0, 8), (2, "y", 1, 3)):
        placed = model.graph.node[node].device_configurations.add(configuration_id="pair")
        spec = placed.sharding_spec.add(tensor_name=name, device=[0, 1])
        spec.sharded_dim.add(axis=axis).simple_sharding.add(dim_value=size, num_shards=2)
    slim = slimmed(model, tmp_path)
    said = [
        spec.tensor_name
        for node in slim.graph.node
        for placed in node.device_configurations
        for spec in placed.sharding_spec
    ]
    assert set(said) <= {"y"}


def test_functions_leave_no_trace(tmp_path):
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 17, "own" : 1, "other" : 2]>
        {HEAD} {{ h = own.inner(x, a)  y = MatMul(h, c) }}
        <domain: "own", opset_import: ["" : 17]> inner (x, w) => (r) <float[N,8] m>
        {{ m = MatMul(x, w)  r = Relu(m) }}
        <domain: "other", opset_import: ["" : 17]> unused (x) => (r) {{ r = Relu(x) }}
    """)
    for name, array in (("a", A), ("c", C)):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    slim = slimmed(model, tmp_path)
    assert not slim.functions
    assert [(o.domain, o.version) for o in slim.opset_import] == [("", 17)]
    check_shapes(slim)
    (found,) = run(tmp_path / "slim.onnx", x=X)
    np.testing.assert_allclose(found, EXPECTED, rtol=1e-4, atol=1e-5)


def test_what_people_wrote_stays(tmp_path):
    model = graph(TEXT, 17, 10, a=A, c=C)
    model.doc_string, model.graph.doc_string, model.graph.node[0].doc_string = "m", "g", "n"
    model.producer_name, model.domain, model.model_version = "p", "d", 7
    model.metadata_props.add(key="author", value="somebody")
    model.graph.metadata_props.add(key="kind", value="net")
    model.graph.node[0].metadata_props.add(key="kind", value="product")
    training = model.training_info.add()
    training.algorithm.name = "step"
    slim = slimmed(model, tmp_path)
    assert (slim.doc_string, slim.graph.doc_string, slim.graph.node[0].doc_string) == (
        "m",
        "g",
        "n",
    )
    assert (slim.producer_name, slim.domain, slim.model_version) == ("p", "d", 7)
    assert {"author": "somebody"}.items() <= {p.key: p.value for p in slim.metadata_props}.items()
    assert [p.value for p in slim.graph.metadata_props] == ["net"]
    assert [p.value for p in slim.graph.node[0].metadata_props] == ["product"]
    assert not slim.training_info  # it computes with weights of other sizes
