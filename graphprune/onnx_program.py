"""ONNX models: as programs that every pass reads, and cut by a plan."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphprune._version import __version__
from graphprune.analysis.blocks import Flow, find_blocks, fixed_blocks, leaving
from graphprune.analysis.cost import Cost
from graphprune.analysis.onnx_declared import check_inputs, check_outputs
from graphprune.analysis.onnx_infer import infer_onnx
from graphprune.analysis.onnx_layers import flow_of
from graphprune.analysis.onnx_quantised import Encoding, encodings, scale_names
from graphprune.analysis.onnx_scopes import module_path
from graphprune.analysis.onnx_sizes import Known, known_values, refreshed
from graphprune.analysis.residual import residual_sums
from graphprune.analysis.structures import find_structures
from graphprune.emit.onnx import EXTERNAL_ABOVE, check_graph
from graphprune.emit.onnx_data import name_data
from graphprune.errors import EmitError
from graphprune.files import replacing
from graphprune.frontends.onnx import adopt_onnx, read_onnx
from graphprune.onnx_tensors import Mapped, weight_bytes
from graphprune.plan import Plan, Selection
from graphprune.program import BaseProgram, Block, Stored
from graphprune.rewrite.onnx import rewrite_onnx
from graphprune.rewrite.onnx_layers import bypass, renumber_layers
from graphprune.rewrite.renumber import shifts_of

if TYPE_CHECKING:
    from graphprune.workload import Workload

# A single file is put together in memory. Above this, temporary files and models that had a second
# file are written in two, weight by weight.
STREAMED_ABOVE = 1 << 26

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
        """See `BaseProgram.inputs`."""
        return tuple(value.name or "" for value in self.model.graph.inputs)

    def code(self) -> str:
        """See `BaseProgram.code`: with the numbers that are no parameters."""
        lines = [ir.serde.serialize_node(node).SerializeToString(deterministic=True).hex()
                 for node in self.model.graph]  # fmt: skip
        for name, value in self.model.graph.initializers.items():
            if name not in self.trainable and value.const_value is not None:
                lines.append(f"{name} {value.const_value.tobytes().hex()}")
        return "\n".join(lines)

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
            weights=_Weights(model.graph, self.encodings),
            origins=self.files,
        )

    @property
    def ranks(self) -> dict[str, int]:
        """See `BaseProgram.ranks`: the bytes of a block of packed numbers are no dimension."""
        packed = {name: int(e.bits > 0) for name, e in self.encodings.items()}
        return {n: rank - packed.get(n, 0) for n, rank in super().ranks.items()}

    def stored(self) -> Iterable[Stored]:
        """See `BaseProgram.stored`."""
        for name in self.trainable:
            encoding = self.encodings.get(name)
            shared = 8 // encoding.bits if encoding is not None and encoding.bits else 1
            yield Stored(name, True, self.known[name].dtype.bitwidth, shared)
        read = [e for name, e in self.encodings.items() if name in self.trainable]
        parts = (p for e in read for p in (*e.scales, e.zero))
        for name in dict.fromkeys(p for p in parts if p is not None):
            yield Stored(name, False, self.known[name].dtype.bitwidth)

    def stacks(self) -> dict[str, tuple[int, list[Block]]]:
        """See `BaseProgram.stacks`."""
        return find_blocks(self._flow, self.typing)

    def fixed_layers(self) -> dict[str, str]:
        """See `BaseProgram.fixed_layers`."""
        return fixed_blocks(self._flow)

    def gone_with(self, blocks: Collection[Block]) -> frozenset[str]:
        """See `BaseProgram.gone_with`: also what several layers share, if all of them go."""
        nodes = frozenset(n for b in blocks for n in b.nodes)
        return frozenset(leaving(self._flow, nodes, [b.entry for b in blocks]) if blocks else ())

    def flow(self) -> Flow:
        """See `BaseProgram.flow`."""
        return self._flow

    @cached_property
    def _flow(self) -> Flow:
        return flow_of(self.model, self.known, self.typing)

    def operator_of(self, value: str) -> tuple[str, str] | None:
        """See `BaseProgram.operator_of`."""
        node = self._producers.get(value)
        if node is None:
            return None
        prefix = f"{node.domain}." if node.domain else ""
        return f"{prefix}{node.op_type}", module_path(node) or ""

    @cached_property
    def _producers(self) -> dict[str, ir.Node]:
        return {v.name or "": node for node in self.model.graph for v in node.outputs}

    def residual_sums(self) -> list[str]:
        """See `BaseProgram.residual_sums`."""
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


class _Weights(Mapping[str, torch.Tensor]):
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


def load_onnx(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> OnnxProgram:
    """Open an ONNX file.

    Args:
        path: the file.
        shapes: input name to an example shape, where the usual ones don't fit the model.

    Raises:
        LoadError: see `read_onnx` and `known_values`.
    """
    return analyse(read_onnx(path), shapes, path)


def adopt(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> OnnxProgram:
    """A program of an ONNX model in memory.

    Args:
        model: it stays as it is; the program shares its weights.
        shapes: as for `load_onnx`.

    Raises:
        LoadError: see `adopt_onnx` and `known_values`.
    """
    return analyse(adopt_onnx(model), shapes, None)


def analyse(
    model: ir.Model, shapes: Mapping[str, Sequence[int]] | None, path: Path | None
) -> OnnxProgram:
    """The program of a model in the form that `read_onnx` gives.

    Raises:
        LoadError: see `known_values`, `check_inputs` and `check_outputs`.
    """
    check_inputs(model)
    known = known_values(model, shapes)
    check_outputs(model, known)
    found, scales = encodings(model.graph), scale_names(model.graph)
    program = OnnxProgram(
        weights=_Weights(model.graph, found),
        aliases={},
        typing=infer_onnx(model, known),
        trainable=frozenset(
            name
            for name in model.graph.initializers
            if prod(known[name].shapes[0]) > 1
            and (name in found or (known[name].dtype.is_floating_point() and name not in scales))
        ),
        path=path,
        model=model,
        known=known,
        encodings=found,
    )
    program.structures = find_structures(program)
    return program


class SlimOnnx:
    """A slim ONNX model.

    Attributes:
        program: the dense program it came from.
        plan: the plan that was applied.
        selection: the plan's masks.
    """

    def __init__(self, program: OnnxProgram, plan: Plan) -> None:
        """A slim model whose tensors are cut when it is written.

        Raises:
            PlanError: the plan was made for another model.
        """
        self.program = program
        self.plan = plan
        self.selection: Selection = plan.bind(program)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every initialiser that is left, by its name."""
        kept = self.plan.kept(self.program)
        left = {name: tuple(map(len, dims)) for name, dims in kept.items()}
        return {name: shape for name, shape in left.items() if all(shape)}

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Dense names to slim ones, which are the same; removed initialisers are absent."""
        return {name: name for name in self.shapes}

    def retraced(self) -> OnnxProgram:
        """The slim model as a program of its own, in memory.

        Raises:
            LoadError: see `adopt`.
        """
        known = self.program.known
        return adopt(self.rewritten(), {n: known[n].shapes[0] for n in self.program.inputs})

    @cached_property
    def cost(self) -> Cost:
        """Parameters, multiply-accumulates and bytes."""
        return self.cost_at(self.program.workload)

    def cost_at(self, workload: Workload) -> Cost:
        """The cost for another input than the usual one."""
        program = self.program
        costs = program.costs if workload == program.workload else program.costs_at(workload)
        blocks = [b for cut in self.selection.cuts.values() for b in cut]
        return costs.of(self.selection.keep, blocks)

    def save(self, path: str | Path, format: str = "onnx") -> None:
        """Write the slim model, checked; large weights go to a second file.

        Raises:
            EmitError: another format, or over the source, or writing failed; nothing is written.
        """
        path = Path(path)
        if format != "onnx":
            raise EmitError(
                f"an ONNX model can't be written as {format}", hint="ask for format onnx"
            )
        self.check_output(path)
        model = self.rewritten()
        largest = STREAMED_ABOVE if self._data_files else EXTERNAL_ABOVE
        write_model(model, path, external=weight_bytes(model) > largest)

    def check_output(self, path: Path) -> None:
        """See that an output, a file or a directory, is no part of the source.

        Raises:
            EmitError: writing would change the source or its data.
        """
        place = path.resolve()
        if any(file.is_relative_to(place) for file in self.program.files):
            raise EmitError(
                "the output is the source itself", where=str(path), hint="choose another path"
            )

    @cached_property
    def _data_files(self) -> set[Path]:
        """Where the source has weights beside the model."""
        return data_of(self.program.model)

    def rewritten(self) -> ir.Model:
        """The slim graph; its weights are cut when they are read."""
        program = self.program
        model = program.model.clone()
        bypass(model, [b for cut in self.selection.cuts.values() for b in cut])
        rewrite_onnx(model, program.known, program.typing, self.selection.keep)
        renumber_layers(model.graph, shifts_of(program, self.selection))
        RemoveUnusedNodesPass()(model)
        model.metadata_props["graphprune.version"] = __version__
        model.metadata_props["graphprune.plan"] = json.dumps(json.loads(self.plan.to_json()))
        return model


def data_of(model: ir.Model) -> set[Path]:
    """The files that the initialisers of a model are in, where they aren't in the model's."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return {Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}


def write_model(model: ir.Model, path: Path, *, external: bool) -> None:
    """Write a model beside its place, check it, and put it there.

    Args:
        model: what to write.
        path: where.
        external: whether weights go to a second file; see `graphprune.emit.onnx_data`.

    Raises:
        EmitError: the checker refuses the model, or the file system does.
    """
    with replacing(path) as file:
        write_checked(model, file, external=external)


def write_checked(model: ir.Model, file: Path, *, external: bool) -> None:
    """Write a model where it is, and check it.

    Args:
        model: what to write.
        file: where; it may have a second file then.
        external: see `write_model`.

    Raises:
        EmitError: the checker refuses the model.
        OSError: the file system refuses.
    """
    _save(model, file, external=external)
    name_data(file)
    check_graph(file)


@contextlib.contextmanager
def temporary_file(model: ir.Model, name: str) -> Iterator[Path]:
    """A model as a file that is gone after the block.

    Raises:
        EmitError: the file system refuses it.
    """
    with contextlib.ExitStack() as stack:
        try:
            holder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graphprune-"))
            file = Path(holder) / name
            _save(model, file, external=weight_bytes(model) > STREAMED_ABOVE)
        except OSError as error:
            raise EmitError(
                "can't write a temporary ONNX file",
                where=tempfile.gettempdir(),
                why=error.strerror or str(error),
                hint="free some disk space, or set TMPDIR to another directory",
            ) from error
        yield file


def _save(model: ir.Model, file: Path, *, external: bool) -> None:
    if not external:
        ir.external_data.load_to_model(model)  # what the source has in another file
    ir.save(model, file, external_data=f"{file.name}.data" if external else None)
