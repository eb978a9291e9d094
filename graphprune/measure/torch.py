"""Latency of PyTorch models, with the input that it is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from graphprune.analysis.workload import Workload
from graphprune.ir.torch.program import Program
from graphprune.ir.torch.workload import Example, example_at
from graphprune.quality import perplexity
from graphprune.quality.measures import Measures
from graphprune.quality.timing import Latency

Module = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """A call that models have been seen to answer.

    Attributes:
        workload: its sizes.
        example: its inputs, positional and by keyword.
        notes: what the reader should know of it.
    """

    workload: Workload
    example: Example
    notes: tuple[str, ...] = ()

    def of(self, module: Module) -> Callable[[], object]:
        """The call of one model."""
        args, kwargs = self.example
        return partial(module, *args, **kwargs)


def usual_call(program: Program, modules: Sequence[Module], length: int | None = None) -> Call:
    """The input that latencies are of; the traced one, where a model doesn't answer the usual one.

    Args:
        program: of the dense model.
        modules: the models that are to be timed.
        length: see `BaseProgram.workload_of`.
    """
    usual = program.workload if length is None else program.workload_of(length)
    call = Call(usual, example_at(program.exported, program.example, usual))
    try:
        with torch.inference_mode():
            for module in modules:
                call.of(module)()
    except Exception as error:  # whatever somebody's code says to other sizes
        traced = program.traced_workload()
        if traced == usual:
            raise
        note = (
            f"MACs and latency are of the traced input, {traced}: for {usual} the model fails with "
            f"{type(error).__name__}"
        )
        return Call(traced, program.example, (note,))
    return call


def latencies(calls: Sequence[Callable[[], object]]) -> list[Latency]:
    """Latencies in turns."""
    return perplexity.torch_latencies(calls)


def with_call(measures: Measures, call: Call, macs: int) -> Measures:
    """A model's numbers with the input that they are of."""
    shapes = dict(call.workload.shapes)
    return replace(measures, macs=macs, input=str(call.workload), inputs=shapes)
