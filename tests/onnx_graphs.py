"""Small ONNX graphs for tests: written from text, pruned at given units, and run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper, parser

import graphprune as gp
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx


def weights(*shape, seed=0):
    """Random numbers, other ones for every shape and seed."""
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(np.float32)


def graph(text, opset=17, ir_version=8, **arrays):
    """A model of text; arrays become initialisers of their names."""
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
    model = parser.parse_model(head + text)
    for name, array in arrays.items():
        if not isinstance(array, onnx.TensorProto):
            array = numpy_helper.from_array(np.asarray(array), name)
        array.name = name
        model.graph.initializer.append(array)
    return model


def fused(text, opset=17, **arrays):
    """A model with operators of ONNX Runtime, whose domain is `ort` in the text."""
    model = graph(text.replace("ort.", "com.microsoft."), opset=opset, ir_version=10, **arrays)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def written(model, folder: Path, name="dense.onnx") -> Path:
    file = folder / name
    onnx.save(model, file)
    return file


def planned(program: OnnxProgram, kept) -> gp.Plan:
    """A plan of ``(initialiser, dimension)`` or ``(initialiser, dimension, size)`` to its units."""
    units, sizes = {}, {}
    for (name, dim, *size), rows in kept.items():
        (structure,) = (
            s
            for s in program.structures
            if (name, dim) in s.members and (not size or s.size == size[0])
        )
        assert structure.prunable, program.frozen()
        units[structure.name] = tuple(rows)
        sizes[structure.name] = structure.size
    return gp.Plan(program.fingerprint, units, sizes)


def run(file: Path, **feeds):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def pruned(model, folder: Path, kept):
    """The slim file of a model, which the oracle has judged."""
    file = written(model, folder)
    program = load_onnx(file)
    plan = planned(program, kept)
    slim = folder / "slim.onnx"
    SlimOnnx(program, plan).save(slim)
    certificate = verify_onnx(program, plan, slim)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 0
    onnx.checker.check_model(str(slim), full_check=True)
    before, after = onnx.load(file).graph, onnx.load(slim).graph
    assert [v.name for v in after.input] == [v.name for v in before.input]
    assert [v.name for v in after.output] == [v.name for v in before.output]
    return slim


def agree(model, folder: Path, kept, expected, **feeds):
    """Compare the slim model's results with numbers that were worked out by hand."""
    slim = pruned(model, folder, kept)
    for found, wanted in zip(run(slim, **feeds), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    return onnx.load(slim)


def initialisers(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def operators(model, kind):
    return [n for n in model.graph.node if n.op_type == kind]


def attribute(node, name):
    (found,) = (onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return found
