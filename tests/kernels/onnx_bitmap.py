"""Models with the operator graphprune::BitmapLinear, and the ways to run them."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphprune.kernels import onnx_function
from graphprune.kernels.formats.bitmap import Bitmap


def model(packed: Bitmap, bias=None, with_function=True, elements=TensorProto.FLOAT):
    """A layer y = x W^T + bias, with an Add for the bias."""
    rows, columns = packed.shape
    product = "y" if bias is None else "product"
    nodes = [onnx_function.node("x", "w", product)]
    arrays = onnx_function.initializers("w", packed)
    if bias is not None:
        nodes.append(helper.make_node("Add", [product, "bias"], ["y"]))
        arrays.append(numpy_helper.from_array(np.asarray(bias), "bias"))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", elements, ["tokens", columns])],
        [helper.make_tensor_value_info("y", elements, ["tokens", rows])],
        arrays,
    )
    made = helper.make_model(
        graph,
        opset_imports=onnx_function.opset_imports(),
        functions=[onnx_function.function()] if with_function else [],
        ir_version=10,
    )
    onnx.checker.check_model(made)
    return made


def session(made, library=None, threads=1, optimized=None):
    """A session; the library is the operator's kernel, and optimized where to save the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(made, x, library=None, threads=1):
    return session(made, library, threads).run(None, {"x": x})[0]


def run_reference(made, x):
    return ReferenceEvaluator(made).run(None, {"x": x})[0]
