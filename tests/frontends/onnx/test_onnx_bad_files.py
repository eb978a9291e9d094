"""Files that can't be compiled: one clear error on the command line and in Python, nothing left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphprune as gp
from cli.helpers import tree
from graphprune.cli import app as cli
from onnx_graphs import graph, weights

A, C = weights(50, 8), weights(8, 3)
TEXT = "g (float[N,50] x) => (float[N,3] y) { h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }"

BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {}


def base():
    return graph(TEXT, a=A, c=C)


def put(model, folder):
    """Write without a check."""
    (folder / "dense.onnx").write_bytes(model.SerializeToString())


def bad(name, *words):
    """A way to write a bad ``dense.onnx``, and what the error has to say."""

    def register(make):
        BAD[name] = make, words
        return make

    return register


def changed(name, *words):
    """The base model, changed in place or replaced."""

    def register(change):
        def make(folder):
            model = base()
            put(change(model) or model, folder)

        return bad(name, *words)(make)

    return register


def external(folder, **entries):
    """The base model with its weights in another file, some entries of the first one changed."""
    onnx.save(base(), folder / "dense.onnx", save_as_external_data=True, location="w.bin",
              size_threshold=0)  # fmt: skip
    model = onnx.load(folder / "dense.onnx", load_external_data=False)
    data = {e.key: e.value for e in model.graph.initializer[0].external_data}
    del model.graph.initializer[0].external_data[:]
    for key, value in (data | entries).items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    put(model, folder)


for name, entries, words in [
    ("an offset below zero", {"offset": "-4"}, ("non-negative", "-4")),
    ("an offset that is no number", {"offset": "x"}, ("'x'",)),
    ("an offset behind the end", {"offset": "99999"}, ("truncated", "101599")),
    ("an offset past all files", {"offset": str(1 << 70)}, ("truncated",)),
    ("a length below zero", {"length": "-1"}, ("non-negative", "-1")),
    ("a length that is too short", {"length": "4"}, ("1600 bytes", "says 4")),
    ("a length that is too long", {"length": "1604"}, ("1600 bytes", "says 1604")),
    ("no location", {"location": ""}, ("outside",)),
    ("the folder itself", {"location": "."}, ("missing",)),
    ("a location with a zero", {"location": "w\0.bin"}, ("null",)),
    ("a location that is too long", {"location": "w" * 9999}, ("www...",)),
    ("a location above", {"location": "../w.bin"}, ("outside", "mistrust")),
    ("a location above and below", {"location": "inner/../../w.bin"}, ("outside",)),
    ("an absolute location", {"location": "/etc/hostname"}, ("outside",)),
    ("a location on a drive", {"location": "C:\\w.bin"}, ("outside",)),
    ("a location above, in Windows", {"location": "..\\w.bin"}, ("outside",)),
]:
    BAD[name] = partial(external, **entries), (*words, "tensor a")
# The library that reads the entries says no more than this.
for name in ("an offset below zero", "an offset that is no number", "a length below zero"):
    BAD[name] = BAD[name][0], BAD[name][1][:-1]


@bad("a link out of the folder", "link that leads outside", "tensor a")
def _(folder):
    external(folder)
    (folder / "w.bin").rename(folder.parent / "w.bin")
    (folder / "w.bin").symlink_to("../w.bin")


@bad("a folder that is a link out", "link that leads outside")
def _(folder):
    external(folder, location="sub/w.bin")
    (folder.parent / "other").mkdir()
    (folder / "w.bin").rename(folder.parent / "other" / "w.bin")
    (folder / "sub").symlink_to("../other")


@bad("a link to itself", "Symlink loop")
def _(folder):
    external(folder)
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to("w.bin")


@bad("a hard link", "2 hard links", "copy the data file")
def _(folder):
    external(folder)
    os.link(folder / "w.bin", folder.parent / "secret")


@bad("a folder instead of data", "missing")
def _(folder):
    external(folder)
    (folder / "w.bin").unlink()
    (folder / "w.bin").mkdir()


def constant(folder, location):
    """The base model with a weight in the attribute of a Constant, and that in another file."""
    (folder / "w.bin").write_bytes(A.tobytes())
    tensor = TensorProto(dims=A.shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model = base()
    del model.graph.initializer[0]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["a"], value=tensor))
    put(model, folder)


BAD["a location above, in an attribute"] = partial(constant, location="../w.bin"), ("outside",)


@bad("a folder instead of a model", "no such file")
def _(folder):
    (folder / "dense.onnx").mkdir()


@bad("a model that is a link to itself", "the path can't be used")
def _(folder):
    (folder / "dense.onnx").symlink_to("dense.onnx")


@changed("bytes that are missing", "a", "too small")
def _(model):
    model.graph.initializer[0].raw_data = A.tobytes()[:100]


@changed("bytes that are too many", "initialiser a", "401")
def _(model):
    model.graph.initializer[0].raw_data = A.tobytes() + b"1234"


@changed("elements that are missing", "a", "399")
def _(model):
    tensor = TensorProto(name="a", dims=A.shape, data_type=TensorProto.FLOAT)
    tensor.float_data.extend(A.reshape(-1)[:-1])
    model.graph.initializer[0].CopyFrom(tensor)


@changed("a weight without data", "one value field")
def _(model):
    model.graph.initializer[0].ClearField("raw_data")


@changed("a size below zero", "Negative dimension")
def _(model):
    model.graph.initializer[0].dims[0] = -50


@changed("a size past all memory", "overflow")
def _(model):
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]


@changed("a type that doesn't exist", "99")
def _(model):
    model.graph.initializer[0].data_type = 99


@changed("two initialisers of one name", "a initializer name is not unique")
def _(model):
    model.graph.initializer.append(model.graph.initializer[0])


@changed("two results of one name", "'r' is redeclared")
def _(model):
    model.graph.node.append(helper.make_node("Relu", ["h"], ["r"]))


@changed("two inputs of one name", "'x'", "multiple times")
def _(model):
    model.graph.input.append(model.graph.input[0])


@changed("an output that nobody makes", "'z' is not an output")
def _(model):
    model.graph.output.append(helper.make_tensor_value_info("z", 1, [1]))


@changed("an attribute that doesn't exist", "Unrecognized attribute: nonsense")
def _(model):
    model.graph.node[1].attribute.append(helper.make_attribute("nonsense", 3))


@changed("a function that calls itself", "calls itself")
def _(model):
    call = helper.make_node("f", ["u"], ["v"], domain="own")
    opsets = [helper.make_opsetid("own", 1), helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "f", ["u"], ["v"], [call], opsets))
    model.graph.node[1].CopyFrom(helper.make_node("f", ["h"], ["r"], domain="own"))
    model.opset_import.append(opsets[0])


@changed("an operator of an unknown domain", "dense.onnx", "my.own", "not a registered")
def _(model):
    model.graph.node[1].domain = "my.own"
    model.opset_import.append(helper.make_opsetid("my.own", 1))


@changed("a domain without a version", "No opset import", "my.own")
def _(model):
    model.graph.node[1].domain = "my.own"


@changed("no version at all", "opset 0 is not supported")
def _(model):
    del model.opset_import[:]


@changed("a format of the future", "ir_version 999")
def _(model):
    model.ir_version = 999


@changed("an input of any rank", "'shape'", "missing")
def _(model):
    model.graph.input[0].type.tensor_type.ClearField("shape")


@changed("a weight that is no number", "not a finite number", "parameter a", "1 of 400")
def _(model):
    broken = A.copy()
    broken[3, 3] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(broken, "a"))


@changed("a graph without anything", "no outputs")
def _(model):
    empty = helper.make_graph([], "g", [], [])
    return helper.make_model(empty, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@changed("a graph without outputs", "no outputs")
def _(model):
    del model.graph.output[:]


@changed("an input without elements", "no example input fits")
def _(model):
    return graph(TEXT.replace("float[N,50]", "float[N,0]"), a=A[:0], c=C)


@changed("an input that is a sequence", "input x", "Sequence", "inputs of your own")
def _(model):
    body = "{ i = Constant<value_int = 0>()  t = SequenceAt(x, i)  y = MatMul(t, a) }"
    return graph(f"g (seq(float[N,50]) x) => (float[N,8] y) {body}", a=A)


@changed("an input that may be missing", "input x", "Optional", "inputs of your own")
def _(model):
    body = "{ t = OptionalGetElement(x)  y = MatMul(t, a) }"
    return graph(f"g (optional(float[N,50]) x) => (float[N,8] y) {body}", a=A)


@changed("an output that is a map", "Map types are not supported")
def _(model):
    entry = onnx.ValueInfoProto(name="z")
    mapping = entry.type.sequence_type.elem_type.map_type
    mapping.key_type = TensorProto.INT64
    mapping.value_type.tensor_type.elem_type = TensorProto.FLOAT
    node = helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    model.graph.node.append(node)
    model.graph.output.append(entry)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))


def sparse():
    values = numpy_helper.from_array(np.ones(2, np.float32), "b")
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.arange(2), "i"), [3])


@changed("an initialiser that is sparse", "initialiser b is sparse")
def _(model):
    model.graph.sparse_initializer.append(sparse())
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(helper.make_node("Add", ["z", "b"], ["y"]))


@changed("a constant that is sparse", "Sparse tensors are not supported")
def _(model):
    model.graph.node.insert(0, helper.make_node("Constant", [], ["b"], sparse_value=sparse()))
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(helper.make_node("Add", ["z", "b"], ["y"]))


@changed("a type that an operator doesn't take", "Cast doesn't take", "makes p", "int2")
def _(model):
    body = "{ p = Cast<to = 1>(a)  y = MatMul(x, p) }"
    tensor = numpy_helper.from_array(A.astype(ml_dtypes.int2), "a")
    return graph(f"g (float[N,50] x) => (float[N,8] y) {body}", 23, 11, a=tensor)


@changed("a type that ONNX Runtime doesn't take", "dense.onnx", "Cast(23)")
def _(model):
    body = "{ p = Cast<to = 1>(a)  r = MatMul(x, p)  h = Relu(r)  y = MatMul(h, c) }"
    tensor = numpy_helper.from_array(A.astype(ml_dtypes.float4_e2m1fn), "a")
    return graph(f"g (float[N,50] x) => (float[N,3] y) {body}", 23, 11, a=tensor, c=C)


@pytest.mark.parametrize("name", BAD)
def test_one_error_and_nothing_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    make, words = BAD[name]
    folder, scratch = tmp_path / "models" / "dense", tmp_path / "scratch"
    folder.mkdir(parents=True)
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    make(folder)
    before = tree(tmp_path)
    source, out = str(folder / "dense.onnx"), str(folder / "out" / "slim.onnx")
    with pytest.raises(gp.GraphPruneError) as caught:
        gp.compile(source, {"remove": {"*": 0.5}}, out)
    text = str(caught.value)
    for word in words:
        assert word in text
    assert len(text.splitlines()) < 12
    assert len(text) < 1200
    assert tree(tmp_path) == before
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["compile", source, "-o", out, "--remove", "*=0.5"])
    shown = capsys.readouterr()
    (line,) = (line for line in shown.err.splitlines() if line.startswith("error: "))
    assert (ended.value.code, line, shown.out) == (1, f"error: {caught.value.what}", "")
    assert "Traceback" not in shown.err
    assert tree(tmp_path) == before
