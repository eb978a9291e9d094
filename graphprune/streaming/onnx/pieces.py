"""Running parts of an ONNX graph, in ONNX Runtime or by the reference evaluator of ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.ir.onnx.ort import NUMBERS, register_libraries
from graphprune.streaming.onnx.schedule import Segment

Values: TypeAlias = "dict[str, Tensor]"
_EMBEDDED = 1 << 10
"""Bytes of an initialiser that lies in the model itself, where shapes are inferred from it."""
_RUNTIME = {v for n, v in NUMBERS.items() if n != "bfloat16"}
"""Numbers of the types that ONNX Runtime and numpy share."""


class Piece:
    """A segment as a model of its own.

    Weights aren't copied: ONNX Runtime reads them where they are, in memory or in a mapped file.
    """

    def __init__(
        self,
        model: ir.Model,
        segment: Segment,
        types: Mapping[str, ir.DataType],
        weight: Callable[[str], ir.TensorProtocol],
    ) -> None:
        """A piece, ready to run.

        Args:
            model: gives versions of operators.
            segment: what is to run.
            types: of the inputs of the segment.
            weight: gives an initialiser by its name, as it is now.

        Raises:
            PlanError: nothing can run it.
        """
        self.segment = segment
        self._model = model
        self._types = types
        self._tensors = {name: weight(name) for name in segment.weights}
        self._large = {
            name: np.asarray(t.numpy())
            for name, t in self._tensors.items()
            if t.nbytes > _EMBEDDED and int(t.dtype) in _RUNTIME
        }
        self._run = self._opened() if segment.nodes else lambda feeds: []

    def __call__(self, values: Mapping[str, Tensor]) -> Values:
        """The outputs, in memory of torch's own.

        Raises:
            PlanError: an operator refuses its operands.
        """
        feeds = {n: to_numpy(values[n], self._types[n]) for n in self.segment.inputs}
        try:
            found = self._run(feeds)
        except Exception as error:  # each runtime has classes of its own
            raise PlanError(
                "a part of the ONNX model doesn't run on a sample",
                where=_words(self.segment),
                why=" ".join(str(error).split())[:500],
            ) from error
        return {n: _to_torch(n, v) for n, v in zip(self.segment.outputs, found, strict=True)}

    def _opened(self) -> Callable[[Mapping[str, Any]], list[Any]]:
        """A function from feeds to outputs, in the order of the segment."""
        try:
            return self._in_runtime()
        except Exception as error:  # no kernel for an operator or a type, or no ONNX Runtime
            refused = error
        inputs = {n: np.asarray(self._tensors[n].numpy()) for n in self._large}
        try:
            _check_meaning(self._model, self.segment)
            evaluator = ReferenceEvaluator(self._proto(external=False))
        except Exception as error:
            raise PlanError(
                "neither ONNX Runtime nor ONNX's reference evaluator can run a part of the model",
                where=_words(self.segment),
                why=f"{' '.join(str(refused).split())[:300]}; {' '.join(str(error).split())[:200]}",
            ) from error
        return lambda feeds: list(evaluator.run(None, {**inputs, **feeds}))

    def _in_runtime(self) -> Callable[[Mapping[str, Any]], list[Any]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.use_deterministic_compute = True
        options.enable_cpu_mem_arena = False  # it would keep twice what a segment needs
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.disable_prepacking", "1")
        # A session doesn't keep what it reads alive.
        self._given = [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in self._large.values()]
        if self._given:
            options.add_external_initializers(list(self._large), self._given)
        register_libraries(options)
        session = onnxruntime.InferenceSession(
            self._proto(external=True).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        names = list(self.segment.outputs)
        return lambda feeds: list(session.run(names, dict(feeds)))

    def _proto(self, *, external: bool) -> onnx.ModelProto:
        """The model; its large weights are external data, or else inputs."""
        graph = onnx.GraphProto(name="segment")
        graph.node.extend(ir.serde.serialize_node(node) for node in self.segment.nodes)
        for name in self.segment.inputs:
            graph.input.append(_typed(name, self._types[name]))
        for name, tensor in self._tensors.items():
            if name not in self._large:
                proto = ir.serde.serialize_tensor(ir.Tensor(tensor.numpy(), dtype=tensor.dtype))
                proto.name = name
                graph.initializer.append(proto)
            elif external:
                proto = graph.initializer.add(name=name, data_type=int(tensor.dtype))
                proto.dims.extend(tensor.shape.numpy())
                proto.data_location = onnx.TensorProto.EXTERNAL
                proto.external_data.add(key="location", value="given")
            else:
                graph.input.append(_typed(name, tensor.dtype))
        graph.output.extend(onnx.ValueInfoProto(name=n) for n in self.segment.outputs)
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in self._model.opset_imports.items()]
        return onnx.ModelProto(ir_version=self._model.ir_version, graph=graph, opset_import=opsets)


def _check_meaning(model: ir.Model, segment: Segment) -> None:
    """Refuse what the reference evaluator takes for an operator of another meaning.

    Raises:
        ValueError: there is one.
    """
    for node in segment.nodes:
        if node.op_type.endswith(("Softmax", "Hardmax")) and model.opset_imports.get("", 13) < 13:
            raise ValueError(f"the reference evaluator has no {node.op_type} of opset 12")


def _typed(name: str, dtype: ir.DataType) -> onnx.ValueInfoProto:
    """A value of a type, of any shape."""
    found = onnx.ValueInfoProto(name=name)
    found.type.tensor_type.elem_type = int(dtype)
    return found


def to_numpy(x: Any, dtype: ir.DataType) -> NDArray[Any]:
    """A value as a runtime takes it; `dtype` is what it has in the graph."""
    if not isinstance(x, Tensor):  # text
        return np.asarray(x, dtype=object)
    if dtype == ir.DataType.FLOAT:  # it may be held in fewer bits
        return x.to(torch.float32).numpy()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(dtype.numpy())
    return x.numpy()


def _to_torch(name: str, value: Any) -> Tensor:
    """A result in memory that begins where torch's begins: kernels may depend on that."""
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind in "OUS":
        raise PlanError(
            "a value that is no tensor of numbers can't wait between two segments",
            where=name,
            why=f"it is a {type(value).__name__}",
            hint="exclude the weights behind it",
        )
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).clone()
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape).clone()


def _words(segment: Segment) -> str:
    """The operators of a segment, the first few of them."""
    names = list(dict.fromkeys(node.op_type for node in segment.nodes))
    shown = ", ".join(names[:6])
    first, last = (segment.nodes[i].outputs[0].name for i in (0, -1))
    return f"{shown}{', ...' if len(names) > 6 else ''} ({first} to {last})"
