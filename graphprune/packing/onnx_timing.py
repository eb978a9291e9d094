"""Whether ONNX Runtime computes a product faster with our kernel here, by measurement."""

from __future__ import annotations

import statistics
import time

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from graphprune.files.refusals import temporary_folder
from graphprune.ir.onnx.ort import open_raw
from graphprune.kernels import native
from graphprune.kernels.choose import DENSE, MARGIN, Setting, Table
from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.onnx_function import function, initializers, node, opset_imports

COLD = 128 << 20  # bytes of dense weights in a model, more than a last-level cache
_TURNS = 9
INSIDE = 1 << 30  # bytes of weights in the file itself; of two gigabytes there can't be any


def faster(matrix: torch.Tensor, tokens: tuple[int, ...], table: Table) -> bool:
    """Whether `BitmapLinear` is faster than a dense product by more than `MARGIN`.

    Args:
        matrix: [outputs, inputs], float32.
        tokens: numbers of tokens at once; the sum of their times counts.
        table: of measured times.
    """
    if not native.available():
        return False
    import onnxruntime

    total = {DENSE: 0.0, Bitmap.format: 0.0}
    for count in tokens:
        setting = Setting.of(matrix, count)
        key = f"ONNX Runtime {onnxruntime.__version__}, {setting.key}"
        known = table.times.get(key)
        if known is None or total.keys() - known.keys():
            known = _measure(matrix, count, setting.threads)
            table.keep(key, known)
        for name in total:
            total[name] += known[name]
    return total[Bitmap.format] * MARGIN < total[DENSE]


def _measure(matrix: torch.Tensor, tokens: int, threads: int) -> dict[str, float]:
    """Seconds of a product, among others whose weights together fit no cache."""
    columns = matrix.shape[1]
    copies = max(2, min(32, -(-COLD // (matrix.numel() * 4))))
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).numpy()
    models = {
        DENSE: _model(matrix, copies, packed=False),
        Bitmap.format: _model(matrix, copies, packed=True),
    }
    with temporary_folder() as holder:
        sessions = {}
        for name, model in models.items():
            file = holder / f"{name}.onnx"
            beside = copies * matrix.numel() * matrix.element_size() > INSIDE
            onnx.save(model, file, save_as_external_data=beside, location=f"{name}.data")
            sessions[name] = open_raw(file, threads, ["cpu"])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(-2, _TURNS):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"x": x})
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / copies)
    return {name: statistics.median(each) for name, each in times.items()}


def _model(matrix: torch.Tensor, copies: int, packed: bool) -> onnx.ModelProto:
    """Products of one input with as many weights, one output each.

    The weights are the matrix with other orders of its rows: of equal ones ONNX Runtime keeps one.
    """
    rows, columns = matrix.shape
    nodes, kept = [], []
    for i in range(copies):
        weight = matrix.roll(i, 0)
        if packed:
            kept += initializers(f"w{i}", Bitmap.pack(weight))
            nodes.append(node("x", f"w{i}", f"y{i}"))
        else:
            kept.append(numpy_helper.from_array(weight.T.contiguous().numpy(), f"w{i}"))
            nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
        [
            helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["tokens", rows])
            for i in range(copies)
        ],
        initializer=kept,
    )
    functions = [function()] if packed else []
    return helper.make_model(
        graph, opset_imports=opset_imports(), ir_version=10, functions=functions
    )
