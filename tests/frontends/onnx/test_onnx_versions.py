"""Files of every version of the format, old ones of which want initialisers among the inputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

import graphprune as gp
from graphprune.frontends.onnx.load import load_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, initialisers, planned, run, weights, written

KEEP = [0, 2, 3, 6]  # of 8
X = weights(4, 5, seed=9)


def of_version(version, **changes):
    """A perceptron whose weights are inputs too."""
    model = graph(
        """g (float[N,5] x, float[5,8] a, float[8,3] c) => (float[N,3] y) {
        h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }""",
        opset=11,
        ir_version=version,
        a=weights(5, 8),
        c=weights(8, 3),
    )
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def wanted():
    return np.maximum(X @ weights(5, 8)[:, KEEP], 0) @ weights(8, 3)[KEEP]


@pytest.mark.parametrize("version", range(3, 12))
def test_every_version(tmp_path, version):
    """From version 4 on, weights need not be inputs, and only from there on may they be cut so."""
    program = load_onnx(written(of_version(version), tmp_path))
    slim = tmp_path / "slim.onnx"
    SlimOnnx(program, planned(program, {("a", 1): KEEP})).save(slim)
    onnx.checker.check_model(str(slim), full_check=True)
    model = onnx.load(slim)
    assert model.ir_version == max(version, 4)
    assert [v.name for v in model.graph.input] == ["x"]
    assert initialisers(model)["a"].shape == (5, 4)
    np.testing.assert_allclose(run(slim, x=X)[0], wanted(), rtol=1e-4, atol=1e-5)


def test_compile_of_version_3(tmp_path):
    """The whole way, with the proof and the files on it that stand between."""
    model = of_version(3, producer_name="an old exporter", model_version=7, doc_string="a net")
    model.metadata_props.append(onnx.StringStringEntryProto(key="author", value="someone"))
    source, slim = written(model, tmp_path), tmp_path / "slim.onnx"
    gp.compile(source, {"remove": {"*": 0.5}}, slim)
    left = onnx.load(slim)
    assert initialisers(left)["a"].shape == (5, 4)
    assert (left.producer_name, left.model_version, left.doc_string) == (
        "an old exporter", 7, "a net",
    )  # fmt: skip
    assert {p.key: p.value for p in left.metadata_props}["author"] == "someone"


def test_the_other_name_of_the_domain(tmp_path):
    model = of_version(3)
    model.opset_import[0].CopyFrom(helper.make_opsetid("ai.onnx", 11))
    program = load_onnx(written(model, tmp_path))
    slim = tmp_path / "slim.onnx"
    SlimOnnx(program, planned(program, {("a", 1): KEEP})).save(slim)
    onnx.checker.check_model(str(slim), full_check=True)
    np.testing.assert_allclose(run(slim, x=X)[0], wanted(), rtol=1e-4, atol=1e-5)
