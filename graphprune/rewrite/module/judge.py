"""What forms of a slim model are judged by: the outputs of its graph, which has been proved."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.frontends.tracing.trace import trace
from graphprune.ir.torch.interpreter import run_graph
from graphprune.ir.torch.memory import affordable_dtype, is_widened_whole
from graphprune.ir.torch.random_inputs import random_inputs
from graphprune.rewrite.module.compare import (
    EXACT,
    Example,
    Outputs,
    deviation,
    probes,
    rounded_off,
    rounding,
    run,
    run_exactly,
)
from graphprune.rewrite.module.reload import outputs


class Judge:
    """The slim graph's outputs, and whether a module has the same.

    A factor that a class computes from a size, such as attention's, may show in nothing but the
    tenth digit on inputs of one scale and be all that counts on those of another. So a module is
    run on several scales and on the caller's example, with every number in float64.

    Attributes:
        inputs: What is compared on; see `graphprune.rewrite.module.compare.probes`.
        dtype: float64, or float32 where even the largest weight doesn't fit into memory in float64.
        whole: Whether modules are copied in float64; else each weight is widened where it is used.
        exact: The outputs for each of the inputs in `dtype`.
        own: Those for the first inputs in the model's own dtype.
        lost: What the graph loses in its own dtype, relative to its largest output.
    """

    def __init__(self, slim: Any) -> None:
        """Run the graph of a :class:`graphprune.rewrite.slim.Slim`."""
        self.from_transformers = slim.program.source is not None
        self.dtype: torch.dtype = affordable_dtype(slim)
        self.whole = is_widened_whole(slim)
        self.inputs, self.exact = _expected(slim, self.dtype)
        self.own: Outputs = run(slim.exported.module(), self.inputs[0])
        self.lost = rounded_off(self.own, self.exact[0])
        self._runs_in_dtype: bool | None = None

    @property
    def tolerance(self) -> float:
        """The difference that passes in `dtype`, relative to the largest output."""
        return EXACT[self.dtype]

    def accepts(self, module: nn.Module) -> bool:
        """Whether a module computes what the graph computes.

        Raises:
            Exception: Whatever its code raises in its own dtype.
        """
        found = run(module, self.inputs[0])
        if deviation(found, self.own, max(rounding(module), self.lost)) is not None:
            return False
        if self._runs_in_dtype is False:
            return self._same(self._traced(module))
        wide = self.widened(module)
        if self._same(wide):
            return True
        if self._runs_in_dtype:
            return False
        # Code may read its dtype (a smallest number, a check) and compute something else in another
        # one. A trace in its own dtype, run in the other, says whether that is why.
        traced = self._traced(module)
        self._runs_in_dtype = _agree(wide, traced, self.tolerance)
        return self._same(traced)

    def _same(self, found: list[Outputs] | None) -> bool:
        return _agree(found, self.exact, self.tolerance)

    def widened(self, module: nn.Module) -> list[Outputs] | None:
        """A module's outputs in `dtype`; None if its code can't be run in it."""
        try:
            return [run_exactly(module, i, self.dtype, whole=self.whole) for i in self.inputs]
        except Exception:  # models raise all kinds on a dtype that they don't expect
            return None

    def _traced(self, module: nn.Module) -> list[Outputs] | None:
        """The same by way of a trace of the module in its own dtype."""
        guard: Any = nullcontext()
        if self.from_transformers:
            from graphprune.frontends.hf.load import traceable

            guard = traceable(module)
        try:
            with guard:
                exported = trace(module, *self.inputs[0]).exported
            return [_graph_outputs(exported, inputs, self.dtype) for inputs in self.inputs]
        except Exception:  # as above; and torch.export has its own
            return None


def _expected(slim: Any, dtype: torch.dtype) -> tuple[list[Example], list[Outputs]]:
    """The inputs that suit the model, and what its graph gives for each."""
    first, *others = probes(slim.program.example)
    if not others:  # token ids: others of their range
        others = [random_inputs(slim.program)]
    inputs, expected = [first], [_graph_outputs(slim.exported, first, dtype)]
    for candidate in others:
        try:
            found = _graph_outputs(slim.exported, candidate, dtype)
        except Exception:  # inputs that depend on each other can't be drawn one by one
            continue
        if any(value.isfinite().any() for value in found.values()):
            inputs.append(candidate)
            expected.append(found)
    return inputs, expected


def _graph_outputs(exported: ExportedProgram, inputs: Example, dtype: torch.dtype) -> Outputs:
    values = run_graph(exported, exported.state_dict, inputs, dtype)
    spec = exported.call_spec.out_spec
    return outputs(values if spec is None else pytree.tree_unflatten(values, spec))


def _agree(found: list[Outputs] | None, expected: list[Outputs] | None, tolerance: float) -> bool:
    if found is None or expected is None:
        return False
    pairs = zip(found, expected, strict=True)
    return all(deviation(f, e, tolerance) is None for f, e in pairs)
