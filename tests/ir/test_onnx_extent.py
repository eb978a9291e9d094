"""ONNX files that stand for more than any machine can hold, or contradict themselves."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphprune as gp
from graphprune.errors import LoadError
from onnx_graphs import run

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]


def function(name, *calls):
    """A function that calls others, one after the other; "" is Relu."""
    values = ["a", *(f"t{i}" for i in range(1, len(calls))), "b"]
    nodes = [
        helper.make_node(call or "Relu", [x], [y], domain="d" if call else "")
        for call, x, y in zip(calls, values, values[1:], strict=False)
    ]
    return helper.make_function("d", name, ["a"], ["b"], nodes, OPSETS)


def doubling(levels):
    """Functions that call the next one twice."""
    inner = [function(f"f{i}", f"f{i + 1}", f"f{i + 1}") for i in range(levels)]
    return [*inner, function(f"f{levels}", "")]


def model(nodes, functions=(), dims=("N", 8), out=("N", 8)):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, out)
    graph = helper.make_graph(nodes, "g", [x], [y])
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=8, functions=functions)


def saved(made, folder):
    (folder / "a.onnx").write_bytes(made.SerializeToString())
    return str(folder / "a.onnx")


CALL = [helper.make_node("f0", ["x"], ["y"], domain="d")]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (doubling(14), "give the same names"),
        (doubling(60), "1,152,921,504,606,846,976|3,458,764,513,820,540,927"),
        ([*(function(f"f{i}", f"f{i + 1}") for i in range(3000)), function("f3000", "")],
         "3000 functions call each other in a row, and 100 is the limit"),
        ([function(f"f{i}", "") for i in range(6000)], "it has 6,000 functions"),
        ([function("f0", "f1"), function("f1", "f0")], "calls itself"),
        ([function("f0", "f0")], "calls itself"),
    ],
)  # fmt: skip
def test_functions_are_counted_before_they_are_written_out(tmp_path, functions, message):
    start = time.monotonic()
    with pytest.raises(LoadError, match=message) as caught:
        gp.load(saved(model(CALL, functions), tmp_path))
    assert "a.onnx" in str(caught.value)
    assert time.monotonic() - start < 30


def test_functions_in_functions_are_read(tmp_path):
    program = gp.load(saved(model(CALL, doubling(5)), tmp_path))
    assert [n.op_type for n in program.model.graph] == ["Relu"] * 32


def test_a_graph_of_too_many_operators(tmp_path, monkeypatch):
    monkeypatch.setattr("graphprune.frontends.onnx.functions.NODES", 20)
    names = ["x", *(f"v{i}" for i in range(20)), "y"]
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in pairwise(names)]
    with pytest.raises(LoadError, match="it has 21 operators, and 20 is the limit"):
        gp.load(saved(model(nodes), tmp_path))


def constant(name, values):
    tensor = numpy_helper.from_array(np.array(values, np.int64), name)
    return helper.make_node("Constant", [], [name], value=tensor)


def summed(*nodes):
    """What nodes make as z, added to the input."""
    return [
        *nodes,
        helper.make_node("ReduceSum", ["z"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]


@pytest.mark.parametrize("dims", [(2**62, 8), (2**62, 2**62), (2**31, 4), ("N", 2**40)])
def test_inputs_that_cannot_be_made(tmp_path, dims):
    made = model([helper.make_node("Relu", ["x"], ["y"])], dims=dims, out=dims)
    with pytest.raises(LoadError, match="too large") as caught:
        gp.load(saved(made, tmp_path))
    assert "where: x" in str(caught.value)


def test_sizes_below_zero(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    with pytest.raises(LoadError, match="below zero"):
        gp.load(saved(model(nodes, dims=(-(2**63), 8)), tmp_path))
    assert gp.load(saved(model(nodes, dims=(-1, 8)), tmp_path)).known["y"].sizes[0].dynamic


def test_values_that_nobody_could_hold(tmp_path):
    nodes = summed(constant("c", [2**31, 2**31]), helper.make_node("ConstantOfShape", ["c"], ["z"]))
    with pytest.raises(LoadError, match="too large") as caught:
        gp.load(saved(model(nodes), tmp_path))
    assert "where: z" in str(caught.value)


def test_large_values_are_not_computed(tmp_path):
    fill = helper.make_node("ConstantOfShape", ["c"], ["z"])
    span = helper.make_node("Range", ["a", "c", "b"], ["w"])
    cast = helper.make_node("Cast", ["w"], ["z"], to=TensorProto.FLOAT)
    ends = (constant("a", 0), constant("b", 1))
    for nodes in ((constant("c", [2**35]), fill), (*ends, constant("c", 2**35), span, cast)):
        program = gp.load(saved(model(summed(*nodes)), tmp_path))
        assert program.known["z"].values is None
        assert program.known["z"].shapes[0] in ((2**35,), ())


def test_an_output_that_is_not_what_it_says(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    for out in (("N", 9), ("N", 2**62), ("N", -5)):
        with pytest.raises(LoadError, match="shape that the model says") as caught:
            gp.load(saved(model(nodes, out=out), tmp_path))
        assert "the operators make [?, 8]" in str(caught.value)
    for out in (("N", 8), ("M", "K"), (1, 8), ()):
        assert gp.load(saved(model(nodes, out=out), tmp_path))


def test_types_and_names_that_are_none(tmp_path):
    made = model([helper.make_node("Relu", ["x"], ["y"], name="node")])
    raw = made.SerializeToString()
    (tmp_path / "a.onnx").write_bytes(raw.replace(b"node", b"no\xffe"))
    with pytest.raises(LoadError, match="not UTF-8"):
        gp.load(str(tmp_path / "a.onnx"))
    made.graph.input[0].type.tensor_type.elem_type = 0
    with pytest.raises(LoadError, match=r"has no type|not valid"):
        gp.load(saved(made, tmp_path))


def test_a_kernel_that_is_not_what_it_says(tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, "H", "W"])
    w = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    for channels, shape in ((3, [7, 3]), (5, [3, 3])):
        x.type.tensor_type.shape.dim[1].dim_value = channels
        node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=shape)
        made = helper.make_model(
            helper.make_graph([node], "g", [x], [y], [w]), opset_imports=OPSETS[:1], ir_version=8
        )
        with pytest.raises(LoadError, match="no example input fits"):
            gp.load(saved(made, tmp_path))


def test_names_of_three_hundred_bytes(tmp_path):
    long = "n" * 300
    a, b = (np.random.default_rng(i).standard_normal((8, 8)).astype("f4") for i in (0, 1))
    nodes = [
        helper.make_node("MatMul", ["x", f"a{long}"], [f"h{long}"], name=f"first{long}"),
        helper.make_node("Relu", [f"h{long}"], [f"r{long}"]),
        helper.make_node("MatMul", [f"r{long}", f"b{long}"], ["y"]),
    ]
    made = model(nodes)
    made.graph.initializer.extend(
        [numpy_helper.from_array(a, f"a{long}"), numpy_helper.from_array(b, f"b{long}")]
    )
    source = saved(made, tmp_path)
    np.save(tmp_path / "x.npy", np.random.default_rng(2).standard_normal((32, 8)).astype("f4"))
    recipe = {
        "remove": {"*": 0.5},
        "repair": "reconstruct",
        "sparsify": {"method": "wanda", "sparsity": 0.5},
        "calibration": {"data": str(tmp_path / "x.npy")},
    }
    gp.compile(source, recipe, tmp_path / "slim.onnx")
    (result,) = run(tmp_path / "slim.onnx", x=np.ones((2, 8), np.float32))
    assert result.shape == (2, 8)
    left = {t.name: tuple(t.dims) for t in onnx.load(tmp_path / "slim.onnx").graph.initializer}
    assert left == {f"a{long}": (8, 4), f"b{long}": (4, 8)}
