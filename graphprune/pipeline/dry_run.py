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
from graphprune.calibration.sources.amounts import REPAIRS, SCORES, WEIGHTS, Amount
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.sources.suited import other_kind
from graphprune.calibration.text.read import BUILTIN, SELF
from graphprune.calibration.tokens import window_length
from graphprune.emit.target import Target
from graphprune.passes.repair.structured import read_by
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe
from graphprune.report.forecast import Forecast, Size
from graphprune.report.inspection import pattern, span
from graphprune.report.report import Report
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.streaming import find_sites

_OF_GRADIENTS = ("taylor", "element1", "element2", "element-mix", "vector")
_GENERATING = 3  # a token at a time takes longer than all at once
_SQUARE = 512  # of the products that are timed
_OVERHEAD = 1.5  # of what is no product, and of products that are slower than those of squares
_TURNS = 40  # calls with the usual input that measuring takes, of both models together


def forecast(report: Report, recipe: Recipe, program: BaseProgram, slim: Slim | SlimOnnx) -> Report:
    """The report of a dry run, with what the run would do.

    Args:
        report: as far as it is known.
        recipe: with a score and a repair in place of ``auto``.
        program: the dense program.
        slim: the slim model, of which nothing has been cut.
    """
    plan = replace(slim.plan, fingerprint=program.fingerprint)
    amounts = _amounts(recipe)
    passes = _passes(recipe, program, plan)
    zeros, among = _zeros(report, recipe)
    form = {True: "native", False: "self-contained", None: None}[report.native]
    found = Forecast(
        sizes=_sizes(program, plan),
        data=_data(program, recipe, amounts) if amounts else None,
        passes=passes,
        formats=tuple(recipe.formats),
        form=form,
        seconds=sum(report.seconds.values()) + _seconds(recipe, program, slim, plan),
        memory=_memory(recipe, program, slim, plan),
        zeros=zeros,
        zeros_of=among,
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
    return Recipe.parse({**recipe.model_dump(exclude_unset=True), "formats": formats})


def check_repair(program: BaseProgram, recipe: Recipe, plan: Plan) -> None:
    """See that what a plan removes can be made up for as a recipe says, without data.

    Args:
        program: the dense program.
        recipe: with a score and a repair in place of ``auto``.
        plan: with as many units as are to stay, whichever they are.

    Raises:
        GraphPruneError: it can't.
    """
    check = getattr(recipe.repair.built(), "check", None) if recipe.repairs else None
    if check is not None and plan.kept_units:
        check(program, plan)


def sizes_are_known(program: BaseProgram, recipe: Recipe, plan: Plan) -> bool:
    """Whether a plan with any choice of units has the sizes that the real one will have.

    It has where every structure of a role keeps as many, and where the layers of a stack that loses
    some are alike. Masks name the weights of the layers that stay, so that these have to be known.
    """
    cut = [program.by_name[n] for n in plan.kept_units if program.by_name[n].blocks]
    alike = (len({program.costs.block(b) for b in stack.blocks}) == 1 for stack in cut)
    return recipe.uniform and (not cut or (recipe.sparsify is None and all(alike)))


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
    found: dict[str, Amount] = {}
    if recipe.operates or recipe.repairs_on_data:
        found["obs" if recipe.operates else recipe.repair.name] = REPAIRS
    if recipe.score_needs_data and not recipe.operates:
        found[recipe.score.name] = SCORES
    if recipe.sparsify is not None and recipe.sparsify.needs_data:
        found[recipe.sparsify.method] = WEIGHTS
    return found


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
        count, length = _windows(program, recipe, amount)
        of = f" of {length:,} tokens" if length else ""
        parts.setdefault(f"up to {count:,} samples{of}", []).append(name)
    if len(parts) == 1:
        return f"{source}, {next(iter(parts))}"
    return f"{source}, " + ", ".join(f"{much} for {' and '.join(n)}" for much, n in parts.items())


def _windows(program: BaseProgram, recipe: Recipe, amount: Amount) -> tuple[int, int | None]:
    """Samples, and the tokens of each where they are tokens."""
    wanted = recipe.calibration
    count = wanted.windows or amount.count
    if token_input(program.signature()) is None:
        return count, None
    return count, window_length(program, wanted, amount.length)


def _passes(recipe: Recipe, program: BaseProgram, plan: Plan) -> tuple[str, ...]:
    """What a run does, in order."""
    found = []
    if recipe.operates:
        found.append("choose units by obs, and refit what reads them")
    elif recipe.removes and recipe.plan is None:
        rounds = f" in {recipe.rounds} rounds" if recipe.rounds > 1 else ""
        found.append(f"rank units by {recipe.score.name}{rounds}")
    if recipe.repairs and plan.kept_units:
        layers = len(read_by(program, plan))
        found.append(f"repair {layers} layers by {recipe.repair.name}")
    if recipe.removes:
        found.append("cut")
    if recipe.sparsify is not None:
        found.append(f"make weights zero by {recipe.sparsify.method}")
    return (*found, "verify", "write", "measure")


def _zeros(report: Report, recipe: Recipe) -> tuple[int | None, int | None]:
    """Weights that are going to be zero, and of how many."""
    if report.masks is None or recipe.sparsify is None:
        return None, None
    weights = sum(layer.weights for layer in report.masks.layers)
    whole = recipe.sparsify.sparsity or 0.0
    parts = (whole if e.target is None else e.target for e in report.masks.layers)
    counts = (e.weights for e in report.masks.layers)
    return round(sum(n * part for n, part in zip(counts, parts, strict=True))), weights


def _seconds(recipe: Recipe, program: BaseProgram, slim: Slim | SlimOnnx, plan: Plan) -> float:
    """About how long what is ahead takes on this machine."""
    work = float(_TURNS * (program.costs.total().macs + slim.cost.macs))
    for name, amount in _amounts(recipe).items():
        count, length = _windows(program, recipe, amount)
        sample = (
            program.costs_at(program.workload_of(length)).total().macs
            if length
            else (program.costs.total().macs)
        )
        written = _GENERATING * _written_share(recipe.calibration)
        work += count * sample * (_times(name, recipe) + written)
        work += _statistics(recipe, program, plan, name, count * (length or _places(program)))
    return _OVERHEAD * work / _macs_per_second()


def _written_share(wanted: Calibration) -> float:
    """The share of the windows that the model writes, if it can write general text."""
    if isinstance(wanted.data, dict):
        return sum(share for part, share in wanted.shares() if part.source == SELF)
    return 1.0 if wanted.data == SELF else (wanted.general or 0.0) / 2


def _runs(recipe: Recipe) -> int:
    """How often a repair takes the data through the model."""
    return int(getattr(recipe.repair.built(), "passes", 1))


def _times(name: str, recipe: Recipe) -> int:
    """How often the data goes through the model for one pass; a gradient counts as two more."""
    if name == "obs":
        return 1 + (_runs(recipe) if recipe.repairs_on_data else 0)
    if recipe.repairs and name == recipe.repair.name:
        return _runs(recipe)
    section = recipe.sparsify
    if section is not None and name == section.method:
        return 1 + int(section.reference) + int(section.budget.name in ("owl", "sensitivity"))
    return recipe.rounds * (3 if name in _OF_GRADIENTS else 1)


def _statistics(recipe: Recipe, program: BaseProgram, plan: Plan, name: str, places: int) -> float:
    """Multiply-accumulates of second moments and of the systems that are solved with them."""
    section = recipe.sparsify
    names: Sequence[str]
    if section is not None and name == section.method:
        names = list(find_sites(program, section.include, section.exclude).parameters)
    elif name in ("obs", "reconstruct"):
        names = read_by(program, plan) if plan.kept_units else []
    else:
        return 0.0
    widths = [_width(program, n) for n in names]
    return float(sum(w * w * (places + 2 * w) for w in widths)) * (1 + (name == "obs"))


def _width(program: BaseProgram, parameter: str) -> int:
    """Inputs of a layer."""
    shape = program.parameters[parameter]
    return max(1, torch.Size(shape).numel() // max(1, max(shape[:1], default=1)))


def _places(program: BaseProgram) -> int:
    """How often a weight is used for one sample, on average."""
    cost = program.costs.total()
    return max(1, cost.macs // max(1, cost.params))


def _memory(recipe: Recipe, program: BaseProgram, slim: Slim | SlimOnnx, plan: Plan) -> int:
    """About how many bytes are needed at once: both models, and what waits for the next layer."""
    size = program.costs.total().bytes + slim.cost.bytes
    streams = [s.size for s in program.structures if s.role == "hidden"]
    width = max(streams, default=max((_width(program, n) for n in program.trainable), default=1))
    waiting = 0
    for amount in _amounts(recipe).values():
        count, length = _windows(program, recipe, amount)
        waiting = max(waiting, 2 * 4 * count * (length or _places(program)) * width)
    names = read_by(program, plan) if recipe.repairs and plan.kept_units else []
    widest = max((_width(program, n) for n in names), default=0)
    return size + waiting + 3 * 8 * widest**2


def _macs_per_second() -> float:
    """How fast products of matrices are here, by the fastest of a few."""
    a = torch.ones(_SQUARE, _SQUARE)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return float(_SQUARE**3 / min(times))
