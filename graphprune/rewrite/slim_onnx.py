"""Applying a plan to an ONNX model."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphprune._version import __version__
from graphprune.analysis.cost import Cost
from graphprune.analysis.workload import Workload
from graphprune.errors import EmitError
from graphprune.frontends.onnx.load import adopt
from graphprune.ir.onnx import files
from graphprune.ir.onnx.files import data_of, write_model
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.onnx.tensors import weight_bytes
from graphprune.plan.plan import Plan, Selection
from graphprune.rewrite.onnx import rewrite_onnx
from graphprune.rewrite.onnx_layers import bypass, renumber_layers
from graphprune.rewrite.renumber import shifts_of


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

    @property
    def aliases(self) -> dict[str, str]:
        """Tied names, of which there are none: what is tied is one initialiser."""
        return {}

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
        largest = files.STREAMED_ABOVE if self._data_files else files.EXTERNAL_ABOVE
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
