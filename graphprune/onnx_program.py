"""ONNX models: as programs that every pass reads, and cut by a plan."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphprune._version import __version__
from graphprune.analysis.cost import Cost
from graphprune.analysis.onnx_infer import infer_onnx
from graphprune.analysis.onnx_sizes import Known, known_values
from graphprune.analysis.residual import residual_sums
from graphprune.analysis.structures import find_structures
from graphprune.errors import EmitError
from graphprune.frontends.onnx import read_onnx
from graphprune.plan import Plan, Selection
from graphprune.program import BaseProgram, Block, Stored
from graphprune.rewrite.onnx import rewrite_onnx

# A protobuf file can't exceed 2 GiB; above this, weights go to a second file.
EXTERNAL_ABOVE = 1 << 30


@dataclass(kw_only=True)
class OnnxProgram(BaseProgram):
    """An ONNX file with the axes of its values.

    Attributes:
        path: the file.
        model: its graph; never changed.
        known: shapes and small values under two examples, by value name.
    """

    path: Path
    model: ir.Model
    known: Mapping[str, Known]

    def stored(self) -> Iterable[Stored]:
        """See `BaseProgram.stored`."""
        for name in self.trainable:
            bits = self.known[name].dtype.bitwidth
            yield Stored(name, True, bits // 8)

    def stacks(self) -> dict[str, tuple[int, list[Block]]]:
        """See `BaseProgram.stacks`: layers of ONNX graphs stay whole."""
        return {}

    def operator_of(self, value: str) -> tuple[str, str] | None:
        """See `BaseProgram.operator_of`."""
        node = self._producers.get(value)
        if node is None:
            return None
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        names = re.findall(r"'([^']*)'", scopes)
        prefix = f"{node.domain}." if node.domain else ""
        return f"{prefix}{node.op_type}", names[-2] if len(names) > 1 else ""

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
            {n for n in graph if n.op_type in ("Add", "Sum")},
            {n for n in graph if n.outputs[0].name in products},
        )
        return [node.outputs[0].name or "" for node in found]


class _Weights(Mapping[str, torch.Tensor]):
    """The initialisers of a graph as tensors; each is read from the file at every access."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._graph.initializers[name].const_value
        if tensor is None:
            raise KeyError(name)
        values = tensor.numpy()
        if tensor.dtype == ir.DataType.BFLOAT16:
            return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.array(values))

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
    model = read_onnx(path)
    known = known_values(model, shapes)
    program = OnnxProgram(
        weights=_Weights(model.graph),
        aliases={},
        typing=infer_onnx(model, known),
        trainable=frozenset(
            name
            for name in model.graph.initializers
            if known[name].dtype.is_floating_point() and prod(known[name].shapes[0]) > 1
        ),
        path=path,
        model=model,
        known=known,
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
    def cost(self) -> Cost:
        """Parameters, multiply-accumulates and bytes."""
        return self.program.costs.of(self.selection.keep)

    def save(self, path: str | Path, format: str = "onnx") -> None:
        """Write the slim model, checked; large weights go to ``<path>.data`` beside it.

        Raises:
            EmitError: another format, or over the source, or writing failed; nothing is written.
        """
        path = Path(path)
        if format != "onnx":
            raise EmitError(
                f"an ONNX model can't be written as {format}", hint="ask for format onnx"
            )
        tensors = [v.const_value for v in self.program.model.graph.initializers.values()]
        source = {Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}
        source.add(self.program.path.resolve())
        if not source.isdisjoint({path.resolve(), Path(f"{path}.data").resolve()}):
            raise EmitError(
                "the output is the source itself", where=str(path), hint="choose another path"
            )
        model = self.rewritten()
        write_model(model, path, external=self.cost.bytes > EXTERNAL_ABOVE)

    def rewritten(self) -> ir.Model:
        """The slim graph; its weights are cut when they are read."""
        program = self.program
        model = read_onnx(program.path)
        rewrite_onnx(model, program.known, program.typing, self.selection.keep)
        RemoveUnusedNodesPass()(model)
        model.metadata_props["graphprune.version"] = __version__
        model.metadata_props["graphprune.plan"] = json.dumps(json.loads(self.plan.to_json()))
        return model


def write_model(model: ir.Model, path: Path, *, external: bool) -> None:
    """Write a model beside its place, check it, and put it there.

    Args:
        model: what to write.
        path: where.
        external: whether weights go to a second file, ``<path>.data``.

    Raises:
        EmitError: the checker refuses the model, or the file system does.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as holder:
            file = Path(holder) / path.name
            _save(model, file, external=external)
            try:
                onnx.checker.check_model(str(file), full_check=True)
            except Exception as error:  # the checker has several
                raise EmitError(
                    "the slim ONNX model is not valid", why=str(error).strip()[:500]
                ) from error
            for written in sorted(file.parent.iterdir(), reverse=True):  # the data file first
                os.replace(written, path.parent / written.name)
    except OSError as error:
        raise EmitError(
            "can't write the ONNX file", where=str(path), why=error.strerror or str(error)
        ) from error


@contextlib.contextmanager
def temporary_file(model: ir.Model, name: str, *, external: bool) -> Iterator[Path]:
    """A model as a file that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="graphprune-") as holder:
        file = Path(holder) / name
        _save(model, file, external=external)
        yield file


def _save(model: ir.Model, file: Path, *, external: bool) -> None:
    if not external:
        ir.external_data.load_to_model(model)  # what the source has in another file
    ir.save(model, file, external_data=f"{file.name}.data" if external else None)
