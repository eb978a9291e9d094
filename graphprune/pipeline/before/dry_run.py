"""Dry runs: what a run would do, told without running the model on data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.signature import token_input
from graphprune.analysis.structure import Structure
from graphprune.calibration.sources.amounts import Amount
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.sources.suited import other_kind
from graphprune.calibration.text.read import BUILTIN, SELF
from graphprune.emit.target import Target
from graphprune.passes.repair.structured import read_by
from graphprune.pipeline.before.estimate import (
    Estimate,
    Worker,
    places,
    waiting_bytes,
    width_of,
    windows_of,
    workers,
)
from graphprune.placement import present
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe
from graphprune.report.forecast import Forecast, Size
from graphprune.report.inspection import pattern, span
from graphprune.report.report import Report
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.streaming import find_sites

_GENERATING = 3  # a token at a time takes longer than all at once
_SQUARE = 512  # of the products that are timed
_OVERHEAD = 1.5  # of what is no product, and of products that are slower than those of squares
_TURNS = 40  # calls with the usual input that measuring takes, of both models together


def forecast(
    report: Report,
    recipe: Recipe,
    program: BaseProgram,
    slim: Slim | SlimOnnx,
    passes: Sequence[str],
) -> Report:
    """Add to the report of a dry run what the run would do.

    Args:
        report: as far as it is known.
        recipe: with a score and a repair in place of ``auto``.
        program: the dense program.
        slim: the slim model, of which nothing has been cut.
        passes: a line on each of the recipe's.
    """
    plan = replace(slim.plan, fingerprint=program.fingerprint)
    amounts = _amounts(recipe)
    zeros, among = _zeros(report, recipe)
    estimate = Estimate.of(recipe, program, present())
    form = {True: "native", False: "self-contained", None: None}[report.native]
    found = Forecast(
        sizes=_sizes(program, plan),
        data=_data(program, recipe, amounts) if amounts else None,
        passes=(*passes, *(["cut"] if recipe.removes else []), "verify", "write", "measure"),
        formats=tuple(recipe.formats),
        form=form,
        seconds=sum(report.seconds.values()) + _seconds(recipe, program, slim, plan),
        memory=_memory(recipe, program, slim, plan),
        zeros=zeros,
        zeros_of=among,
        estimate=None if estimate is None else str(estimate),
    )
    return replace(report, forecast=found)


def with_output(
    recipe: Recipe, output: str | Path, overwrite: bool, reads: Mapping[str, Path]
) -> Recipe:
    """A recipe with the formats that an output can hold.

    Args:
        recipe: the recipe.
        output: as the user gave it.
        overwrite: whether what is there may be replaced.
        reads: see `graphprune.emit.target.Target.of`.

    Raises:
        EmitError: the real run would refuse the output.
    """
    formats = Target.of(output, recipe, overwrite, reads).formats
    return recipe.replaced(formats=formats)


def _sizes(program: BaseProgram, plan: Plan) -> tuple[Size, ...]:
    """What is cut, structures that are cut alike together."""
    gone = plan.bind(program).removed_parameters
    rows = []
    for name, units in plan.kept_units.items():
        s = program.by_name[name]
        if s.blocks or not gone.issuperset(p for p, _ in s.members):
            first = units[0]
            rows.append((s, len(first) if isinstance(first, tuple) else len(units)))

    def kind(row: tuple[Structure, int]) -> tuple[str, str, int, int]:
        return row[0].role or "other", pattern(row[0].name), row[0].size, row[1]

    found = []
    for (role, _, before, after), group in itertools.groupby(sorted(rows, key=kind), kind):
        names = tuple(s.name for s, _ in group)
        found.append(Size(role, names, before, after, span(names)))
    return tuple(found)


def _amounts(recipe: Recipe) -> dict[str, Amount]:
    """What needs data, to how much it takes where the recipe doesn't say."""
    return {one.name: one.amount for one in workers(recipe)}


def _data(program: BaseProgram, recipe: Recipe, amounts: dict[str, Amount]) -> str:
    """The source, and how much of it.

    Raises:
        LoadError: the built-in text is all there is, and the model reads no tokens.
    """
    wanted, inputs = recipe.calibration, program.signature()
    if wanted.data is None and token_input(inputs) is None:
        raise other_kind(BUILTIN, "token ids", inputs)
    source = " + ".join(wanted.sources) or "the built-in text"
    source += f" ({wanted.general:.0%} general text)" if wanted.general else ""
    parts: dict[str, list[str]] = {}
    for name, amount in amounts.items():
        count, length = windows_of(program, recipe, amount)
        of = f" of {length:,} tokens" if length else ""
        parts.setdefault(f"up to {count:,} samples{of}", []).append(name)
    if len(parts) == 1:
        return f"{source}, {next(iter(parts))}"
    return f"{source}, " + ", ".join(f"{much} for {' and '.join(n)}" for much, n in parts.items())


def _zeros(report: Report, recipe: Recipe) -> tuple[int | None, int | None]:
    """Weights that are going to be zero, and of how many."""
    if report.masks is None or not recipe.masks:
        return None, None
    weights = sum(layer.weights for layer in report.masks.layers)
    whole = recipe.masks[-1].sparsity or 0.0
    parts = (whole if e.target is None else e.target for e in report.masks.layers)
    counts = (e.weights for e in report.masks.layers)
    return round(sum(n * part for n, part in zip(counts, parts, strict=True))), weights


def _seconds(recipe: Recipe, program: BaseProgram, slim: Slim | SlimOnnx, plan: Plan) -> float:
    """About how long what is ahead takes on this machine."""
    work = float(_TURNS * (program.costs.total().macs + slim.cost.macs))
    for one in workers(recipe):
        count, length = windows_of(program, recipe, one.amount)
        sample = (
            program.costs_at(program.workload_of(length)).total().macs
            if length
            else (program.costs.total().macs)
        )
        written = _GENERATING * _written_share(recipe.calibration)
        work += count * sample * (one.passes(count, length) + written)
        if one.fits:
            work += _statistics(recipe, program, plan, one, count * (length or places(program)))
    return _OVERHEAD * work / _macs_per_second()


def _written_share(wanted: Calibration) -> float:
    """The share of the windows that the model writes, if it can write general text."""
    if isinstance(wanted.data, dict):
        return sum(share for part, share in wanted.shares() if part.source == SELF)
    return 1.0 if wanted.data == SELF else (wanted.general or 0.0) / 2


def _statistics(
    recipe: Recipe, program: BaseProgram, plan: Plan, one: Worker, places: int
) -> float:
    """Multiply-accumulates of second moments and of the systems that are solved with them."""
    masks = next((m for m in recipe.masks if m.method == one.name), None)
    names: Sequence[str]
    if masks is not None:
        names = list(find_sites(program, masks.include, masks.exclude).parameters)
    else:
        names = read_by(program, plan) if plan.kept_units else []
    widths = [width_of(program, n) for n in names]
    return float(sum(w * w * (places + 2 * w) for w in widths)) * (1 + (one.name == "obs"))


def _memory(recipe: Recipe, program: BaseProgram, slim: Slim | SlimOnnx, plan: Plan) -> int:
    """About how many bytes are needed at once: both models, and what waits for the next layer."""
    size = program.costs.total().bytes + slim.cost.bytes
    waiting = 0
    for amount in _amounts(recipe).values():
        count, length = windows_of(program, recipe, amount)
        waiting = max(waiting, waiting_bytes(program, count * (length or places(program))))
    names = read_by(program, plan) if recipe.repairs and plan.kept_units else []
    widest = max((width_of(program, n) for n in names), default=0)
    trained = max((one.held(program.costs.total().params) for one in workers(recipe)), default=0)
    return size + waiting + max(trained, 3 * 8 * widest**2)


def _macs_per_second() -> float:
    """How fast products of matrices are here, by the fastest of a few."""
    a = torch.ones(_SQUARE, _SQUARE)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return float(_SQUARE**3 / min(times))
