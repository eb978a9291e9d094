"""Independent numbers for streamed runs over ONNX graphs.

Rows are those for which the operator's own result, computed by ONNX Runtime from the whole model,
is ``row @ matrix.T``; statistics are those of the whole model in float64 in ONNX's reference
evaluator, from the start for every group.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from graphprune.frontends.onnx.load import load_onnx
from graphprune.streaming import batches, find_sites, stream
from onnx_graphs import weights, written
from streaming.oracle import Halving

FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE


def program_of(model, folder, shapes=None):
    return load_onnx(written(model, folder), shapes)


class Rows:
    """An observer that keeps what it sees."""

    def __init__(self):
        self.seen = []

    def add(self, x):
        assert x.dim() == 2
        self.seen.append(x.clone())

    @property
    def rows(self):
        return torch.cat(self.seen)


class Looking:
    """A treatment that changes nothing and keeps all rows, by parameter."""

    def __init__(self):
        self.observers = {}
        self.layouts = {}

    def observer(self, group, part):
        return Rows()

    def treat(self, group, observers, weights):
        for name in group.parameters:
            self.observers[name] = list(observers)
            self.layouts[name] = group.layout(name)
        return ()


def widened(model, new):
    """The model in float64, with some initialisers exchanged."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in wide.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name in new:
            array = new[tensor.name].numpy()
        if array.dtype == np.float32:
            array = array.astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = DOUBLE
    del wide.graph.value_info[:]
    return wide


def value_of(model, new, feeds, name):
    """A value of the model in float64."""
    if name in feeds:
        return np.asarray(feeds[name], dtype=np.float64)
    wide = widened(model, new)
    del wide.graph.output[:]
    wide.graph.output.append(onnx.ValueInfoProto(name=name))
    given = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in feeds.items()}
    (found,) = ReferenceEvaluator(wide).run([name], given)
    return np.asarray(found)


def images(*shape, count=3, seed=1):
    """Samples with a batch dimension of one."""
    return [{"x": weights(1, *shape, seed=seed + i)} for i in range(count)]


def go(program, data, treatment=None, batch=1, **options):
    """Stream; the new weights and the treatment, which halves unless another one is given."""
    treatment = treatment or Halving()
    new = stream(program, find_sites(program), batches(program, data, batch), treatment, **options)
    return new, treatment
