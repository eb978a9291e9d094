"""tools/bench device: calibration, solvers and scores on a GPU, against the processor."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from _bench_train import smollm2

if TYPE_CHECKING:
    from graphprune.ir.torch.program import Program
    from graphprune.placement import Placement

HALF = 0.5
NO_GPU = 2
"""The exit status where there is nothing to measure."""


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        name: for the table.
        run: does it, and gives what both devices are to agree in: parameter to what stays.
    """

    name: str
    run: Callable[[], dict[str, Any]]


def main(options: argparse.Namespace) -> int:
    """Measure, and print a table."""
    from graphprune.errors import GraphPruneError
    from graphprune.placement import Placement, on_device

    try:
        place = Placement.of(options.device)
    except GraphPruneError as error:
        print(error, file=sys.stderr)
        return NO_GPU
    if not place.away:
        print("there is no GPU here that could be compared with the processor", file=sys.stderr)
        return NO_GPU
    import graphprune as gp
    from graphprune.streaming import text_windows

    program = gp.load(options.model or smollm2())
    windows = text_windows(program, count=options.windows, length=options.length)
    print(f"{place}, {torch.get_num_threads()} threads, {len(windows)} windows of {options.length}")
    print(f"{'':<12}{'processor':>10}{'device':>10}{'speed-up':>10}{'same':>8}")
    for work in _works(program, windows):
        with on_device(place):
            work.run()  # kernels are loaded, and memory is taken
            there, found = _timed(work, place)
        with on_device("cpu"):
            here, wanted = _timed(work, Placement())
        print(f"{work.name:<12}{here:>9.1f}s{there:>9.1f}s{here / there:>9.1f}x"
              f"{_agreement(wanted, found):>8.2%}", flush=True)  # fmt: skip
    return 0


def _works(program: Program, windows: torch.Tensor) -> list[Work]:
    import graphprune as gp
    from graphprune.passes.masks import METHODS, method
    from graphprune.solvers import Unstructured

    def masks(name: str) -> dict[str, Any]:
        found = gp.sparsify(program, windows, method(name, {}), Unstructured(HALF))
        return {e.parameter: found.program.weights[e.parameter] != 0 for e in found.layers}

    def units(score: str) -> dict[str, Any]:
        plan = gp.select(program, remove={"ffn": 0.25}, score=score, calibration=windows)
        return {
            name: torch.isin(torch.arange(program.by_name[name].size), torch.tensor(kept))
            for name, kept in plan.kept_units.items()
        }

    found = [Work(name, lambda name=name: masks(name)) for name in METHODS.names()]  # type: ignore[misc]
    scores = ("obs", "taylor", "flap")
    return found + [Work(name, lambda name=name: units(name)) for name in scores]  # type: ignore[misc]


def _timed(work: Work, place: Placement) -> tuple[float, dict[str, Any]]:
    """Seconds, and what was found."""
    begun = time.perf_counter()
    found = work.run()
    if place.away:
        torch.accelerator.synchronize(place.device)
    return time.perf_counter() - begun, found


def _agreement(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The share of the entries in which both agree."""
    same = sum(int((one[name] == other[name]).sum()) for name in one)
    return same / sum(mask.numel() for mask in one.values())
