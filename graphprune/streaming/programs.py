"""The four steps of a streamed run, for a program of either kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.batches import Batch
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Selection
from graphprune.streaming.core import weights as torch_weights
from graphprune.streaming.core.cache import Held
from graphprune.streaming.core.checkpoint import State
from graphprune.streaming.core.sites import Sites
from graphprune.streaming.core.weights import TreatedWeights, fitting
from graphprune.streaming.onnx.run import stream_onnx
from graphprune.streaming.onnx.sites import find_onnx_sites
from graphprune.streaming.onnx.sums import summands
from graphprune.streaming.torch import run as torch_run
from graphprune.streaming.torch import sites as torch_sites
from graphprune.streaming.torch.run import Step, Treatment
from graphprune.streaming.torch.schedule import Schedule

Some = TypeVar("Some", bound=BaseProgram)


def find_sites(
    program: BaseProgram,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    every: bool = False,
) -> Sites:
    """Find where weights are applied; see `graphprune.streaming.torch.sites.find_sites`."""
    if isinstance(program, OnnxProgram):
        return find_onnx_sites(program, include, exclude, every=every)
    return torch_sites.find_sites(_traced(program), include, exclude, every=every)


def in_streams(program: BaseProgram, sites: Sites) -> frozenset[str]:
    """The weights whose product is added to a residual stream: to a value computed before it."""
    if isinstance(program, OnnxProgram):
        met = summands(program, sites.all.values())
        return frozenset(s.parameter for s in sites.all.values() if s.node in met)
    schedule = Schedule(_traced(program), sites, sums=True)
    return frozenset(
        parameter
        for probes in schedule.probes.values()
        for probe in probes
        for parameter, other in probe.sums
        if other is not None
    )


def stream(
    program: BaseProgram,
    sites: Sites,
    batches: Sequence[Batch],
    treatment: Treatment,
    *,
    dtype: torch.dtype = torch.float32,
    held: torch.dtype | Held | None = None,
    reference: bool = False,
    selection: Selection | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> TreatedWeights:
    """Treat the weights of a program, each with statistics of the samples.

    See `graphprune.streaming.torch.run.stream`, and for what differs
    `graphprune.streaming.onnx.run.stream_onnx`.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "held": held,
        "reference": reference,
        "selection": selection,
        "progress": progress,
        "state": state,
    }
    if isinstance(program, OnnxProgram):
        return stream_onnx(program, sites, batches, treatment, **options)
    return torch_run.stream(_traced(program), sites, batches, treatment, **options)


def apply_weights(program: Some, new: Mapping[str, Tensor]) -> Some:
    """A program with some weights exchanged, of the types and shapes of the old ones."""
    if isinstance(program, OnnxProgram):
        return program.with_weights(fitting(program, new))  # type: ignore[return-value]
    return torch_weights.apply_weights(_traced(program), new)  # type: ignore[return-value]


def _traced(program: BaseProgram) -> Program:
    assert isinstance(program, Program)  # there is no third kind
    return program
