"""Small models for tests, as ONNX Runtime's own tools quantise them."""

from __future__ import annotations

import logging
from math import ceil, prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import (
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from graphprune.ir.onnx.ort import saturates
from graphprune.ir.onnx.program import OnnxProgram
from onnx_graphs import graph, weights, written

RUNTIME = "com.microsoft"  # the domain of ONNX Runtime's own operators

CONV = """g (float[N,3,8,8] x) => (float[N,5] y) {
    a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1, b1)  r = Relu(a)
    d = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8>(r, w2, b2)  e = Relu(d)
    f = Conv<kernel_shape = [1, 1]>(e, w3, b3)  s = Add(f, r)
    p = GlobalAveragePool(s)  q = Flatten<axis = 1>(p)  y = Gemm<transB = 1>(q, w4, b4) }"""

# Four heads of 16, and an inner width of 128, on a width of 64.
LAYER = """g (float[N,L,64] x) => (float[N,L,64] y) {
    q0 = MatMul(x, wq)  q1 = Add(q0, bq)  q2 = Reshape(q1, apart)
    q = Transpose<perm = [0, 2, 1, 3]>(q2)
    k0 = MatMul(x, wk)  k2 = Reshape(k0, apart)  k = Transpose<perm = [0, 2, 3, 1]>(k2)
    v0 = MatMul(x, wv)  v2 = Reshape(v0, apart)  v = Transpose<perm = [0, 2, 1, 3]>(v2)
    s0 = MatMul(q, k)  s1 = Mul(s0, scale)  s = Softmax<axis = -1>(s1)
    c0 = MatMul(s, v)  c1 = Transpose<perm = [0, 2, 1, 3]>(c0)  c2 = Reshape(c1, flat)
    o0 = MatMul(c2, wo)  o1 = Add(o0, bo)  o2 = Add(o1, x)
    n = LayerNormalization<axis = -1>(o2, g, b)
    u0 = MatMul(n, wu)  u1 = Add(u0, bu)  u2 = Relu(u1)
    d0 = MatMul(u2, wd)  d1 = Add(d0, bd)  d2 = Add(d1, n)
    y = LayerNormalization<axis = -1>(d2, g, b) }"""


def convolutional():
    return graph(
        CONV,
        w1=weights(8, 3, 3, 3),
        b1=weights(8),
        w2=weights(8, 1, 3, 3),
        b2=weights(8, seed=1),
        w3=weights(8, 8, 1, 1),
        b3=weights(8, seed=2),
        w4=weights(5, 8),
        b4=weights(5),
    )


def transformer(opset=17):
    square = {n: 0.2 * weights(64, 64, seed=i) for i, n in enumerate(("wq", "wk", "wv", "wo"))}
    vectors = {n: 0.2 * weights(64, seed=i) for i, n in enumerate(("bq", "bo", "bd", "b"))}
    return graph(
        LAYER,
        opset=opset,
        apart=np.array([0, 0, 4, 16]),
        flat=np.array([0, 0, 64]),
        scale=np.array(0.25, np.float32),
        wu=0.2 * weights(64, 128),
        bu=0.2 * weights(128),
        wd=0.2 * weights(128, 64),
        g=1 + 0.2 * weights(64, seed=9),
        **square,
        **vectors,
    )


def embedded(opset=17):
    """The transformer between two projections, so that its width is its own."""
    model = transformer(opset)
    for node in model.graph.node:
        for names, name in ((node.input, "x"), (node.output, "y")):
            names[:] = [f"{name}_inner" if n == name else n for n in names]
    first = onnx.helper.make_node("MatMul", ["x", "first"], ["x_inner"])
    last = onnx.helper.make_node("MatMul", ["y_inner", "last"], ["y"])
    model.graph.node.insert(0, first)
    model.graph.node.append(last)
    for name, shape in (("first", (12, 64)), ("last", (64, 5))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights(*shape), name))
    for value, width in ((model.graph.input[0], 12), (model.graph.output[0], 5)):
        value.type.tensor_type.shape.dim[2].dim_value = width
    return model


SHAPES = {convolutional: (2, 3, 8, 8), transformer: (2, 7, 64), embedded: (2, 7, 12)}


class Batches:
    """A few batches of one input, or of those given."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        return next(self.batches, None)


def static(build, folder: Path, **options) -> Path:
    """A model after quantize_static."""
    batches = [{"x": weights(*SHAPES[build], seed=i)} for i in range(3)]
    source, file = written(build(), folder, "float.onnx"), folder / "dense.onnx"
    options = {"quant_format": QuantFormat.QDQ, **options}
    with quiet():
        quantize_static(source, file, Batches(batches), **options)
    return file


def dynamic(build, folder: Path, **options) -> Path:
    """A model after quantize_dynamic, of as many bits as this processor multiplies exactly.

    Products that saturate do so elsewhere in a slim model than in the dense one.
    """
    source, file = written(build(), folder, "float.onnx"), folder / "dense.onnx"
    with quiet():
        quantize_dynamic(source, file, reduce_range=saturates(), **options)
    return file


def packed(model, folder: Path, *, bits=4, symmetric=False, level=0, qdq=False, block=16) -> Path:
    """A model after MatMulNBitsQuantizer."""
    quantiser = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=block,
        is_symmetric=symmetric,
        accuracy_level=level,
        quant_format=QuantFormat.QDQ if qdq else QuantFormat.QOperator,
    )
    with quiet():
        quantiser.process()
    file = folder / "dense.onnx"
    quantiser.model.save_model_to_file(str(file))
    return file


class quiet:
    """Without the advice that the tools log."""

    def __enter__(self):
        logging.disable(logging.WARNING)

    def __exit__(self, *error):
        logging.disable(logging.NOTSET)


CONVOLUTIONAL = {
    "QDQ": lambda folder: static(convolutional, folder),
    "QDQ, unsigned": lambda folder: static(
        convolutional, folder, activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8
    ),
    "QDQ, per channel": lambda folder: static(convolutional, folder, per_channel=True),
    "operators": lambda folder: static(convolutional, folder, quant_format=QuantFormat.QOperator),
    "operators, per channel": lambda folder: static(
        convolutional, folder, quant_format=QuantFormat.QOperator, per_channel=True
    ),
    "dynamic": lambda folder: dynamic(convolutional, folder),
}

TRANSFORMER = {
    "QDQ": lambda folder: static(transformer, folder),
    "QDQ, 16 bits": lambda folder: static(transformer, folder, activation_type=QuantType.QUInt16),
    "QDQ, per channel": lambda folder: static(transformer, folder, per_channel=True),
    "operators": lambda folder: static(
        transformer, folder, quant_format=QuantFormat.QOperator, activation_type=QuantType.QUInt8
    ),
    "dynamic": lambda folder: dynamic(transformer, folder),
    "dynamic, per channel": lambda folder: dynamic(transformer, folder, per_channel=True),
    "4 bits": lambda folder: packed(transformer(21), folder),
    "4 bits, no zero points": lambda folder: packed(transformer(21), folder, symmetric=True),
    "4 bits, int8 inside": lambda folder: packed(transformer(21), folder, level=4),
    "8 bits": lambda folder: packed(transformer(21), folder, bits=8),
    "4 bits, QDQ": lambda folder: packed(transformer(21), folder, qdq=True),
}


def exactly(file, **feeds):
    """Results as the graph says, without fused operators."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def bits_of(tensor: onnx.TensorProto) -> int:
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize


def stored_bytes(file: Path, program: OnnxProgram) -> int:
    """Bytes in a file of the tensors that the program counts."""
    counted = {one.name for one in program.stored()}
    tensors = [t for t in onnx.load(file).graph.initializer if t.name in counted]
    assert len(tensors) == len(counted)
    return sum(ceil(prod(t.dims) * bits_of(t) / 8) for t in tensors)
