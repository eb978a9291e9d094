"""What a group of weights takes of a device, and what that leaves to activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.batches import Batch
from graphprune.errors import CalibrationError
from graphprune.placement import Placement
from graphprune.placement.waiting import Room
from graphprune.streaming.core.sites import Group, Sites

_COPIES = 4
"""Of a weight in float32 while it is solved: itself, what is new, and two in between."""

_SYSTEMS = 3
"""Matrices in float64, as wide as a statistic, while one is factorised."""

_SHARE = 0.9
"""Of the device: allocators don't fill gaps."""


def group_bytes(program: BaseProgram, group: Group) -> int:
    """About how many bytes the weights, statistics and solves of a group take at a time."""
    weights, widest, statistics = 0, 0, 0
    for name in group.parameters:
        shape = torch.Size(program.parameters[name])
        matrices = group.layout(name).matrices(torch.empty(shape, device="meta"))
        weights = max(weights, _COPIES * 4 * shape.numel())
        widest = max(widest, matrices.shape[2])
        statistics = max(statistics, 4 * matrices.shape[0] * matrices.shape[2] ** 2)
    return weights + statistics + _SYSTEMS * 8 * widest**2


def working_bytes(program: BaseProgram, sites: Sites) -> int:
    """The most that a group of weights takes; activations aren't counted."""
    return max((group_bytes(program, group) for group in sites.groups), default=0)


def activation_room(program: BaseProgram, sites: Sites, placement: Placement) -> Room:
    """What activations may take of a device: half of what the largest group leaves.

    The other half is for what a batch computes between two groups.
    """
    room = placement.room() if placement.away else None
    if room is None:
        return Room()
    return Room(max(0, int(_SHARE * room) - working_bytes(program, sites)) // 2)


def no_room(
    program: BaseProgram, sites: Sites, placement: Placement, batches: Sequence[Batch]
) -> CalibrationError:
    """The error for a device that is too small, which says what would fit."""
    largest = max(sites.groups, key=lambda group: group_bytes(program, group))
    needs = group_bytes(program, largest)
    room = placement.room()
    has = "" if room is None else f", of {shown_bytes(room)} that may be taken"
    count = max(one.count for one in batches)
    samples = "one sample" if count == 1 else f"{count} samples"
    return CalibrationError(
        f"there isn't enough memory on {placement}",
        where=f"the group of {largest.name}",
        why=f"its weights, statistics and solves take about {shown_bytes(needs)}{has}, and "
        f"{samples} at a time go through beside them",
        hint="give shorter samples (calibration.length), allow more (memory), leave out this "
        "weight (sparsify.exclude), or calibrate on the processor (device: cpu)",
    )


def shown_bytes(size: float) -> str:
    """A size for people: "3.2 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
