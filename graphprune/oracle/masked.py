"""The masked model: the original graph at full size, with removed coordinates zeroed.

It is what a slim model has to equal, and it is computed without the rewriter: no weight is cut, no
size in the graph is changed. After every node the result is set to zero at the coordinates that
the plan removes, and operators that would notice the zeros are computed over the kept coordinates
by the formulas of `graphprune.oracle.masked_ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import Dims
from graphprune.ir.torch.interpreter import GraphRunner, Inputs
from graphprune.ir.torch.program import Program
from graphprune.ops import find_op
from graphprune.oracle.masked_ops import Call, Masks
from graphprune.plan.plan import Selection, stand_ins


def run_masked(
    program: Program,
    selection: Selection,
    inputs: Inputs,
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """Run the masked model; see `run_graph` for the arguments and the result."""
    return MaskedInterpreter(program, selection, dtype).outputs(inputs)


class Masking(GraphRunner):
    """Zeroes what a plan removes, and computes what would notice the zeros by other formulas."""

    def begin(self, program: Program, selection: Selection) -> None:
        """Run the masked model of `program` from now on."""
        self.values = program.typing.values
        self.keep = selection.keep
        self.masks = Masks(selection.keep)

    def _read(self, node: fx.Node, name: str) -> Any:
        return self._zeroed(node.name, super()._read(node, name))

    def _finish(self, node: fx.Node, value: Any) -> Any:
        return super()._finish(node, self._zeroed(node.name, value))

    def _compute(
        self,
        target: torch._ops.OpOverload[..., Any],
        arguments: dict[str, Any],
        nodes: Mapping[str, Any],
    ) -> Any:
        formula = find_op(target._schema.name.replace("::", ".")).masked
        if formula is not None:
            operand, x = next(iter(arguments.items()))
            dims = self.values[nodes[operand].name][0]
            kept = self.masks.whole(dims, x.shape, nodes[operand].name)
            if kept is not None:
                return formula(Call(target, arguments, operand, kept.to(x.device)))
        return super()._compute(target, arguments, nodes)

    def _zeroed(self, name: str, value: Any) -> Any:
        """`value` with zeros at its removed coordinates, whatever was there, NaN included."""
        axes = self.values.get(name)
        if axes is None:
            return value
        if isinstance(value, list | tuple):
            return tuple(self._zero(name, v, d) for v, d in zip(value, axes, strict=True))
        return self._zero(name, value, axes[0])

    def _zero(self, name: str, value: Any, dims: Dims) -> Any:
        if not isinstance(value, Tensor) or len(dims) != value.dim():
            return value
        self.masks.observe(dims, value.shape)
        kept = self.masks.whole(dims, value.shape, name)
        return value if kept is None else value.masked_fill(~kept.to(value.device), 0)


class MaskedInterpreter(Masking):
    """Runs the masked model of a program."""

    def __init__(
        self,
        program: Program,
        selection: Selection,
        dtype: torch.dtype = torch.float64,
        *,
        watch: bool = False,
    ) -> None:
        """A masked model.

        Args:
            program: the dense program.
            selection: what is kept; of a removed layer the entry takes the place of the exit.
            dtype: the floating dtype of everything.
            watch: record in `nonfinite` which values hold NaN or infinity.
        """
        super().__init__(
            program.exported,
            program.weights,
            dtype,
            program.aliases,
            stand_ins(selection),
            removed=selection.removed_nodes,
            watch=watch,
        )
        self.begin(program, selection)

    def outputs(self, inputs: Inputs) -> list[Any]:
        """Run on (args, kwargs); the flat user outputs."""
        self.masks = Masks(self.keep)  # dynamic dimensions may have other sizes now
        return super().outputs(inputs)
