"""Streamed runs over a program of any graph format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.batches import Batch, halved
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import Program
from graphprune.placement import Placement, let_go, on_device, settled
from graphprune.placement.waiting import Held, Room, Waiting
from graphprune.plan.plan import Selection
from graphprune.ranks.group import current
from graphprune.solvers.precision import exact_everywhere
from graphprune.streaming.budget import activation_room, no_room
from graphprune.streaming.core.adapter import GraphAdapter, Options
from graphprune.streaming.core.checkpoint import State
from graphprune.streaming.core.sites import Site, Sites
from graphprune.streaming.core.treatment import Separable, Step, Treatment
from graphprune.streaming.core.weights import TreatedWeights
from graphprune.streaming.onnx.adapter import OnnxAdapter
from graphprune.streaming.run import Run
from graphprune.streaming.torch.adapter import TorchAdapter

Some = TypeVar("Some", bound=BaseProgram)


def adapter_for(program: BaseProgram) -> GraphAdapter:
    """The adapter of a program's graph format; nothing else in this package asks which it is."""
    if isinstance(program, OnnxProgram):
        return OnnxAdapter(program)
    assert isinstance(program, Program)  # there is no third format
    return TorchAdapter(program)


def find_sites(
    program: BaseProgram,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    every: bool = False,
) -> Sites:
    """Find where weights are applied, and group those that read the same value.

    Matrices of linear layers, convolutions and experts are taken. Routers, depthwise kernels,
    single outputs and what computes an output of the model are only if `include` has their full
    name; a weight whose other uses are no such products (an embedding that is the output layer too)
    never is.

    Args:
        program: a traced program, or an ONNX model.
        include: globs of parameter names to choose from; None for all.
        exclude: globs of parameter names to leave out.
        every: whether those are taken, too, that only a full name brings in otherwise.

    Raises:
        PlanError: nothing is left to treat, or a glob matches nothing that could be.
    """
    return adapter_for(program).find_sites(include, exclude, every=every)


def find_biases(program: BaseProgram, sites: Iterable[Site]) -> dict[str, str]:
    """Find the biases of linear layers and convolutions that nothing else reads.

    Args:
        program: a traced program, or an ONNX model.
        sites: where weights are applied.

    Returns:
        Canonical name of a weight to that of its bias, a parameter with one number per output.
    """
    return adapter_for(program).find_biases(sites)


def in_streams(program: BaseProgram, sites: Sites) -> frozenset[str]:
    """The weights whose product is added to a residual stream: to a value computed before it."""
    added = adapter_for(program).summands(sites.all.values())
    return frozenset(s.parameter for s in sites.all.values() if s.node in added)


def stream(
    program: BaseProgram,
    sites: Sites,
    batches: Sequence[Batch],
    treatment: Treatment | Separable,
    *,
    dtype: torch.dtype = torch.float32,
    held: torch.dtype | Held | None = None,
    reference: bool = False,
    selection: Selection | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
    device: str | torch.device | Placement | None = None,
) -> TreatedWeights:
    """Treat the weights of a program, each with statistics of the samples.

    Args:
        program: a traced program with weights, or an ONNX model; it isn't changed.
        sites: what to treat; see `find_sites`.
        batches: the samples; see `graphprune.streaming.batches`.
        treatment: what to do to the weights.
        dtype: of all floating computation; of an ONNX model, whose operators run in the types that
            it has, of the rows that observers see, at least.
        held: the dtype in which activations wait for the next partition, None for that of the
            computation; or how, with `Held`. Of an ONNX model it is that of float32 values.
        reference: run the dense model along, and tell observers the gap (see `GapObserver`). It
            costs a second pass, the memory of its activations, and two products for each weight.
        selection: what a plan leaves: the treated model runs as if it had been applied. The samples
            of an ONNX model must have one size then.
        progress: called after each group.
        state: where to save progress, and to go on from; None saves nothing.
        device: where to compute; see `graphprune.on_device`, which None follows. An ONNX model is
            computed on the processor, wherever that is.

    Returns:
        The new weights by parameter, in the dtypes and on the devices of the old ones.

    Raises:
        CalibrationError: the device has no room, not even for half as many samples at a time.
        PlanError: the samples don't fit the program, an activation or a new weight isn't finite, a
            new weight has another shape, or nothing can run a part of an ONNX model.
        LoadError: `state` belongs to another run.
    """
    placement = settled(device) if program.format == "torch" else Placement()
    folder = None if state is None else Path(state.directory)
    room = activation_room(program, sites, placement)
    waiting = Waiting.of(Held.of(held), placement, room, folder)
    options = Options(dtype, reference, selection, waiting)
    exactly = exact_everywhere() if placement.away else nullcontext()
    tell, adapter = progress or (lambda step: None), adapter_for(program)
    with torch.no_grad(), exactly, on_device(placement):
        run = Run(program, adapter, sites, batches, treatment, options, state)
        try:
            return run.treat(tell)
        except torch.OutOfMemoryError as error:
            # Other processes wouldn't know that this one begins anew.
            can_retry = current().world == 1 and not run.solving
            smaller = halved(batches) if can_retry else None
            if smaller is None:
                raise no_room(program, sites, placement, batches) from error
        # What the error held of the device is free only now.
        del run.models, run.observers
        let_go(placement.device)
        options = replace(options, waiting=replace(waiting, room=Room(0)))
        again = Run(program, adapter, sites, smaller, treatment, options, None)
        again.follow(run)
        try:
            return again.treat(tell)
        except torch.OutOfMemoryError as error:
            raise no_room(program, sites, placement, smaller) from error


def apply_weights(program: Some, new: Mapping[str, Tensor]) -> Some:
    """A program with some weights exchanged; structures, graph and source stay.

    It is saved as any program is: `graphprune.apply` with an empty plan gives a model that `save`
    writes in every format.

    Args:
        program: the program; not changed.
        new: canonical parameter name to tensor of the same shape.

    Raises:
        PlanError: a name is unknown, or a shape another.
    """
    return adapter_for(program).with_weights(new)  # type: ignore[no-any-return]
