"""Damaged, foreign and unusual ONNX files: one clear error each, and nothing written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import EmitError, LoadError
from graphprune.frontends.onnx.load import load_onnx
from graphprune.frontends.onnx.read import read_onnx
from graphprune.ir.onnx.files import write_model
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, initialisers, planned, run, weights, written

KEEP = [0, 2, 3, 6]
A, C = weights(50, 8), weights(8, 3)
X = weights(4, 50, seed=9)
WANTED = np.maximum(X @ A[:, KEEP], 0) @ C[KEEP]


def model(opset=17):
    return graph(
        "g (float[N,50] x) => (float[N,3] y) { h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }",
        opset=opset,
        a=A,
        c=C,
    )


def external(folder, location="weights.bin"):
    """The model with its weights in another file."""
    folder.mkdir(exist_ok=True)
    file = folder / "dense.onnx"
    onnx.save(model(), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    if location != "weights.bin":
        proto = onnx.load(file, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        file.write_bytes(proto.SerializeToString())
    return file


def refused(file, *words):
    before = sorted(p.name for p in file.parent.iterdir())
    with pytest.raises(LoadError) as caught:
        load_onnx(file)
    text = str(caught.value)
    for word in (*words, file.name):
        assert word in text
    assert len(text.splitlines()) < 12
    assert sorted(p.name for p in file.parent.iterdir()) == before


def test_no_file(tmp_path):
    refused(tmp_path / "none.onnx", "no such file")


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_truncated(tmp_path, part):
    file = written(model(), tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    refused(file)


@pytest.mark.parametrize("data", [b"", b"hello, I am no model\n", b"\x00" * 100, b"PK\x03\x04zip"])
def test_no_onnx_at_all(tmp_path, data):
    file = tmp_path / "dense.onnx"
    file.write_bytes(data)
    refused(file)


def test_missing_data(tmp_path):
    file = external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    refused(file, "weights.bin", "missing")


def test_truncated_data(tmp_path):
    file = external(tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-8])
    refused(file, "weights.bin", "truncated")


def test_data_outside_of_the_folder(tmp_path):
    file = external(tmp_path / "inner", "../weights.bin")
    shutil.copy(tmp_path / "inner" / "weights.bin", tmp_path / "weights.bin")
    refused(file, "outside")


def test_data_at_an_absolute_place(tmp_path):
    file = external(tmp_path / "inner", str(tmp_path / "weights.bin"))
    shutil.copy(tmp_path / "inner" / "weights.bin", tmp_path / "weights.bin")
    refused(file, "outside")


@pytest.mark.parametrize("opset", [1, 9, 10])
def test_old_opset(tmp_path, opset):
    refused(written(model(opset), tmp_path), f"opset {opset} is not supported")


def test_opset_of_the_future(tmp_path):
    proto = model()
    proto.opset_import[0].version = 1000
    refused(written(proto, tmp_path), "opset 1000 is not supported")


def test_cycle(tmp_path):
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Identity", ["a"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    refused(written(proto, tmp_path), "not valid")


def test_a_value_that_nobody_makes(tmp_path):
    proto = model()
    proto.graph.node[1].input[0] = "nothing"
    refused(written(proto, tmp_path), "not valid", "nothing")


def test_an_operator_that_does_not_exist(tmp_path):
    proto = model()
    proto.graph.node[1].op_type = "Reluu"
    refused(written(proto, tmp_path), "not valid", "Reluu")


def test_shapes_that_do_not_fit(tmp_path):
    proto = graph(
        "g (float[N,7] x) => (float[N,3] y) { h = MatMul(x, a)  y = MatMul(h, c) }", a=A, c=C
    )
    file = written(proto, tmp_path)
    with pytest.raises(LoadError, match="no example input fits"):
        load_onnx(file)


def slim(file):
    program = load_onnx(file)
    return SlimOnnx(program, planned(program, {("a", 1): KEEP}))


def test_the_source_is_never_written_over(tmp_path):
    file = written(model(), tmp_path)
    before = file.read_bytes()
    with pytest.raises(EmitError, match="source itself"):
        slim(file).save(tmp_path / "." / "dense.onnx")
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["dense.onnx"]


def test_data_of_the_source_is_never_written_over(tmp_path):
    file = external(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(EmitError, match="source itself"):
        slim(file).save(tmp_path / "weights.bin")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("inside", [False, True])
def test_data_of_the_source_that_is_called_as_the_output_s_stays(tmp_path, inside):
    file = external(tmp_path, "out.onnx.data")
    (tmp_path / "weights.bin").rename(tmp_path / "out.onnx.data")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for _ in range(2):
        write_model(slim(file).rewritten(), tmp_path / "out.onnx", external=inside)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert len(list(tmp_path.iterdir())) == len(before) + 1 + inside
    (found,) = run(tmp_path / "out.onnx", x=X)
    np.testing.assert_allclose(found, WANTED, rtol=1e-4, atol=1e-5)


def test_another_format(tmp_path):
    with pytest.raises(EmitError, match="can't be written as hf"):
        slim(written(model(), tmp_path)).save(tmp_path / "out", format="hf")
    assert [p.name for p in tmp_path.iterdir()] == ["dense.onnx"]


def test_nothing_is_left_of_what_the_checker_refuses(tmp_path, monkeypatch):
    result = slim(written(model(), tmp_path))
    rewritten = result.rewritten()

    def refuse(file, **options):
        assert Path(file).is_file()
        raise onnx.checker.ValidationError("no")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(EmitError, match="not valid"):
        write_model(rewritten, tmp_path / "s.onnx", external=True)
    assert [p.name for p in tmp_path.iterdir()] == ["dense.onnx"]


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_data_in_another_file(tmp_path, inside, outside):
    """Both forms are read, both are written."""
    file = external(tmp_path) if outside else written(model(), tmp_path)
    result = slim(file)
    out = tmp_path / "out" / "slim.onnx"
    write_model(result.rewritten(), out, external=inside)
    others = [p for p in out.parent.iterdir() if p != out]
    assert len(others) == inside
    for data in others:  # called by its content
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
        assert data.name == f"slim.onnx.{digest[:12]}.data"
    moved = tmp_path / "moved"
    out.parent.rename(moved)  # what it refers to is beside it
    (found,) = run(moved / "slim.onnx", x=X)
    np.testing.assert_allclose(found, WANTED, rtol=1e-4, atol=1e-5)
    again = load_onnx(moved / "slim.onnx")
    np.testing.assert_array_equal(again.weights["a"].numpy(), A[:, KEEP])
    assert verify_onnx(result.program, result.plan, moved / "slim.onnx").passed


def test_provenance(tmp_path):
    proto = model()
    helper.set_model_props(proto, {"author": "somebody"})
    result = slim(written(proto, tmp_path))
    result.save(tmp_path / "slim.onnx")
    props = {p.key: p.value for p in onnx.load(tmp_path / "slim.onnx").metadata_props}
    assert props["author"] == "somebody"
    assert props["graphprune.version"]
    plan = json.loads(props["graphprune.plan"])
    assert plan == json.loads(result.plan.to_json())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_types_of_weights_stay(tmp_path, dtype):
    proto = graph(
        """g (float[N,50] x) => (float[N,3] y) {
        p = Cast<to = 1>(a)  q = Cast<to = 1>(c)
        h = MatMul(x, p)  r = Relu(h)  y = MatMul(r, q) }""",
        a=numpy_helper.from_array(A.astype(dtype), "a"),
        c=numpy_helper.from_array(C.astype(dtype), "c"),
    )
    result = slim(written(proto, tmp_path))
    result.save(tmp_path / "slim.onnx")
    found = onnx.load(tmp_path / "slim.onnx")
    before = {t.name: t.data_type for t in proto.graph.initializer}
    assert {t.name: t.data_type for t in found.graph.initializer} == before
    cut = initialisers(found)["a"]
    np.testing.assert_array_equal(cut.astype(np.float64), A.astype(dtype)[:, KEEP].astype(float))
    assert verify_onnx(result.program, result.plan, tmp_path / "slim.onnx").passed
    assert str(result.program.weights["a"].dtype)[6:] == np.dtype(dtype).name


def test_functions_are_inlined(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[N,50] x) => (float[N,3] y) { h = own.layer(x, a)  y = MatMul(h, c) }
    <domain: "own", opset_import: ["" : 17]>
    layer (u, v) => (w) { t = MatMul(u, v)  w = Relu(t) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in (("a", A), ("c", C)))
    result = slim(written(proto, tmp_path))
    result.save(tmp_path / "slim.onnx")
    (found,) = run(tmp_path / "slim.onnx", x=X)
    np.testing.assert_allclose(found, WANTED, rtol=1e-4, atol=1e-5)


def test_the_long_name_of_the_standard_domain(tmp_path):
    proto = model(12)
    proto.opset_import[0].domain = "ai.onnx"
    result = slim(written(proto, tmp_path))
    result.save(tmp_path / "slim.onnx")
    (found,) = run(tmp_path / "slim.onnx", x=X)
    np.testing.assert_allclose(found, WANTED, rtol=1e-4, atol=1e-5)


def test_reading_changes_nothing(tmp_path):
    file = external(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    read_onnx(file)
    slim(file).rewritten()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
