"""The four steps of a streamed run, for a program of either kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from graphprune.inputs import inputs_of
from graphprune.onnx_program import OnnxProgram
from graphprune.plan import Selection
from graphprune.program import BaseProgram, Program
from graphprune.streaming import data as torch_data
from graphprune.streaming import run as torch_run
from graphprune.streaming import sites as torch_sites
from graphprune.streaming import weights as torch_weights
from graphprune.streaming.data import Batch
from graphprune.streaming.held import Held
from graphprune.streaming.onnx_data import onnx_batches
from graphprune.streaming.onnx_run import stream_onnx
from graphprune.streaming.onnx_sites import find_onnx_sites
from graphprune.streaming.onnx_sums import summands
from graphprune.streaming.run import Step, Treatment
from graphprune.streaming.schedule import Schedule
from graphprune.streaming.sites import Sites
from graphprune.streaming.state import State
from graphprune.streaming.weights import TreatedWeights, fitting

Some = TypeVar("Some", bound=BaseProgram)

_TOKENS = 2048
"""Tokens of a batch, about: more don't make its products quicker."""

_FEWEST = 16
"""Batches that there are at least, as far as there are samples: repairs compare halves of them."""


def find_sites(
    program: BaseProgram,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    every: bool = False,
) -> Sites:
    """Find where weights are applied; see `graphprune.streaming.sites.find_sites`."""
    if isinstance(program, OnnxProgram):
        return find_onnx_sites(program, include, exclude, every=every)
    return torch_sites.find_sites(_traced(program), include, exclude, every=every)


def batches(program: BaseProgram, data: Any, batch: int | None = None) -> list[Batch]:
    """Samples in the form that a program takes.

    See `graphprune.streaming.data.batches`, and `graphprune.streaming.onnx_data.onnx_batches`.
    Without `batch`, windows of tokens go through together, the more the shorter they are.
    """
    if callable(data) and not isinstance(data, Tensor | Mapping | Batch | np.ndarray):
        data = data()
    if batch is None:
        batch = _suited(program, data)
    if isinstance(program, OnnxProgram):
        return onnx_batches(program, data, batch)
    return torch_data.batches(_traced(program), data, batch)


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


def _suited(program: BaseProgram, data: Any) -> int:
    """How many samples to run at a time: a call of an operator costs more than a few rows do."""
    tensors = list(data.values()) if isinstance(data, Mapping) else [data]
    shapes = {tuple(getattr(t, "shape", ())) for t in tensors}
    if len(shapes) != 1 or any(i.shape[:1] != (None,) for i in inputs_of(program)):
        return 1
    (shape,) = shapes
    if len(shape) != 2 or any("int" not in str(t.dtype) for t in tensors):
        return 1
    count, length = shape
    most = max(1, min(_TOKENS // max(length, 1), count // _FEWEST))
    # A rest would be of another size: halves of the samples wouldn't be equal, and some runs take
    # one size only.
    return max(size for size in range(1, most + 1) if count % size == 0)


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

    See `graphprune.streaming.run.stream`, and for what differs `onnx_run.stream_onnx`.
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
    """A program with some weights exchanged; see `graphprune.streaming.weights.apply_weights`."""
    if isinstance(program, OnnxProgram):
        return program.with_weights(fitting(program, new))  # type: ignore[return-value]
    return torch_weights.apply_weights(_traced(program), new)  # type: ignore[return-value]


def _traced(program: BaseProgram) -> Program:
    assert isinstance(program, Program)  # there is no third kind
    return program
