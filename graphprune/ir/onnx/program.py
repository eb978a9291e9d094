"""ONNX models: as programs that every pass reads, and cut by a plan."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from graphprune.analysis.blocks import Flow, find_blocks, fixed_blocks, leaving
from graphprune.analysis.facts import Stored
from graphprune.analysis.program import BaseProgram, GraphFormat
from graphprune.analysis.residual import residual_sums
from graphprune.analysis.signature import Input
from graphprune.analysis.structure import Block
from graphprune.analysis.workload import Workload, resized
from graphprune.axes import Atom
from graphprune.ir.onnx.files import data_of, temporary_file
from graphprune.ir.onnx.flow import flow_of
from graphprune.ir.onnx.scopes import module_path
from graphprune.ir.onnx.shapes.quantised import Encoding
from graphprune.ir.onnx.shapes.sizes import Known, refreshed
from graphprune.ir.onnx.signature import inputs_of_model
from graphprune.ir.onnx.tensors import Mapped
from graphprune.ir.onnx.workload import known_at, workload_of_model

# The operators that add two results, some of which do more.
SUMS = (
    "Add", "Sum", "QLinearAdd", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
)  # fmt: skip


@dataclass(kw_only=True)
class OnnxProgram(BaseProgram):
    """An ONNX model with the axes of its values.

    Attributes:
        path: its file; None for a model in memory.
        model: its graph; never changed.
        known: shapes and small values under two examples, by value name.
        encodings: how initialisers that hold quantised numbers are read, by name. They are
            parameters, and `weights` has the numbers that they stand for.
        origins: the files that a model in memory was made from; no output takes their place.
    """

    format: ClassVar[GraphFormat] = "onnx"

    path: Path | None
    model: ir.Model
    known: Mapping[str, Known]
    encodings: Mapping[str, Encoding]
    origins: frozenset[Path] = frozenset()

    @contextlib.contextmanager
    def file(self) -> Iterator[Path]:
        """The model as a file: its own, or one that is gone after the block."""
        if self.path is not None:
            yield self.path
            return
        with temporary_file(self.model.clone(), "dense.onnx") as file:
            yield file

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that the model is given, in order."""
        return tuple(value.name or "" for value in self.model.graph.inputs)

    def code(self) -> str:
        """See `BaseProgram.code`: with the numbers that are no parameters."""
        lines = [ir.serde.serialize_node(node).SerializeToString(deterministic=True).hex()
                 for node in self.model.graph]  # fmt: skip
        for name, value in self.model.graph.initializers.items():
            if name not in self.trainable and value.const_value is not None:
                lines.append(f"{name} {value.const_value.tobytes().hex()}")
        return "\n".join(lines)

    def as_inputs(self, data: Any) -> Any:
        """See `BaseProgram.as_inputs`."""
        return pytree.tree_map_only(torch.Tensor, _array, data)

    @property
    def origin(self) -> Path | None:
        """Its file; None for a model in memory."""
        return self.path

    @property
    def files(self) -> frozenset[Path]:
        """The file of the model, those of its external data, and what a model was made from."""
        own = () if self.path is None else (self.path.resolve(),)
        return frozenset((*own, *data_of(self.model))) | self.origins

    def with_weights(self, new: Mapping[str, torch.Tensor]) -> OnnxProgram:
        """The same program with other numbers in some initialisers, which aren't quantised.

        Args:
            new: name to a tensor of the type and shape of the old one.
        """
        model = self.model.clone()
        for name, tensor in new.items():
            initializer = model.graph.initializers[name]
            initializer.const_value = ir.tensor_adapters.TorchTensor(tensor, name)
        return replace(
            self,
            path=None,
            model=model,
            known=refreshed(model, self.known, new),
            weights=Initializers(model.graph, self.encodings),
            origins=self.files,
        )

    @property
    def ranks(self) -> dict[str, int]:
        """See `BaseProgram.ranks`: the bytes of a block of packed numbers are no dimension."""
        packed = {name: int(e.bits > 0) for name, e in self.encodings.items()}
        return {n: rank - packed.get(n, 0) for n, rank in super().ranks.items()}

    def stored(self) -> Iterable[Stored]:
        """The tensors that the model's size is made of."""
        for name in self.trainable:
            encoding = self.encodings.get(name)
            shared = 8 // encoding.bits if encoding is not None and encoding.bits else 1
            yield Stored(name, True, self.known[name].dtype.bitwidth, shared)
        read = [e for name, e in self.encodings.items() if name in self.trainable]
        parts = (p for e in read for p in (*e.scales, e.zero))
        for name in dict.fromkeys(p for p in parts if p is not None):
            yield Stored(name, False, self.known[name].dtype.bitwidth)

    def stacks(self) -> dict[str, tuple[int, list[Block]]]:
        """Path of every stack of layers to its length and the layers that can be removed."""
        return find_blocks(self._flow, self.typing)

    def fixed_layers(self) -> dict[str, str]:
        """Path of every layer of a stack that can't be removed, to the reason."""
        return fixed_blocks(self._flow)

    def gone_with(self, blocks: Collection[Block]) -> frozenset[str]:
        """See `BaseProgram.gone_with`: also what several layers share, if all of them go."""
        nodes = frozenset(n for b in blocks for n in b.nodes)
        return frozenset(leaving(self._flow, nodes, [b.entry for b in blocks]) if blocks else ())

    def flow(self) -> Flow:
        """What of the graph matters to its layers."""
        return self._flow

    @cached_property
    def _flow(self) -> Flow:
        return flow_of(self.model, self.known, self.typing)

    def operator_of(self, value: str) -> tuple[str, str] | None:
        """Name of the operator that computes a value, and its module, as far as it is known."""
        node = self._producers.get(value)
        if node is None:
            return None
        prefix = f"{node.domain}." if node.domain else ""
        return f"{prefix}{node.op_type}", module_path(node) or ""

    @cached_property
    def _producers(self) -> dict[str, ir.Node]:
        return {v.name or "": node for node in self.model.graph for v in node.outputs}

    def signature(self) -> list[Input]:
        """The inputs, in order; only what is no tensor is missing."""
        return list(inputs_of_model(self.model, self.known))

    def workload_of(self, length: int) -> Workload:
        """One sample as an input to count multiply-accumulates for."""
        return workload_of_model(self.model, self.known, length)

    def traced_workload(self) -> Workload:
        """The input that a program was traced with, or the first example of an ONNX file."""
        shapes = {name: self.known[name].shapes[0] for name in self.workload.shapes}
        return Workload(shapes, self.workload.tokens)

    def sizes_at(self, workload: Workload) -> dict[Atom, int]:
        """Sizes of the axes that have others in a call than in the program's example."""
        known = known_at(self.model, self.known, workload)
        shapes = {name: (k.shapes[0],) for name, k in known.items()}
        return dict(resized(self.typing.values, shapes))

    def residual_sums(self) -> list[str]:
        """Names of the values ``x + f(x)``."""
        products = {name for name, _ in self.typing.contractions}
        graph = self.model.graph

        def sources(node: ir.Node) -> list[ir.Node]:
            found = (v.producer() for v in node.inputs if v is not None)
            return [n for n in dict.fromkeys(found) if n is not None]

        found = residual_sums(
            graph,
            sources,
            {n for n in graph if n.op_type in SUMS},
            {n for n in graph if n.outputs[0].name in products},
        )
        return [node.outputs[0].name or "" for node in found]


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Initializers(Mapping[str, torch.Tensor]):
    """The initialisers of a graph as tensors; each is read from the file at every access.

    Quantised numbers are float32: those that the integers stand for, see `Encoding.decode`.
    """

    def __init__(self, graph: ir.Graph, encodings: Mapping[str, Encoding]) -> None:
        self._graph = graph
        self._encodings = encodings

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._graph.initializers[name].const_value
        if tensor is None:
            raise KeyError(name)
        if name in self._encodings:
            return torch.from_numpy(self._encodings[name].decode(name, self._graph))
        values = tensor.numpy()
        if not isinstance(tensor, Mapped):  # what is mapped is a copy as soon as it is written to
            values = np.array(values)
        if tensor.dtype == ir.DataType.BFLOAT16:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        if tensor.dtype.bitwidth < 16 and values.dtype.kind not in "iub":
            # torch has no arithmetic on so few bits
            values = values.astype(np.float32)
        return torch.from_numpy(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._graph.initializers)

    def __len__(self) -> int:
        return len(self._graph.initializers)
