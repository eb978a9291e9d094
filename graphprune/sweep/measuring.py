"""Measuring all points beside the dense model, which is run once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.measured import evaluation_windows, measured_texts
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.tokens import tokenizer_for
from graphprune.exclusive import one_at_a_time
from graphprune.ir.torch.program import Program, is_traced
from graphprune.measure.completions import PROMPTS, TOKENS, complete, prompt_tokens
from graphprune.measure.measuring import unmeasurable
from graphprune.measure.torch import latencies, usual_call, with_call
from graphprune.quality.attempts import attempted
from graphprune.quality.compare import Pair, compare_all
from graphprune.quality.measures import Measures
from graphprune.quality.perplexity import NoPerplexityError, Perplexity
from graphprune.quality.result import Comparison, Completion, Estimate, Quality
from graphprune.report.figures import measures_of
from graphprune.rewrite.slim import Slim
from graphprune.sweep.ledger import Ledger
from graphprune.sweep.making import Made
from graphprune.sweep.result import Point


@dataclass(frozen=True)
class Read:
    """All points, measured.

    Attributes:
        before: of the dense model.
        points: of each.
        notes: what couldn't be measured.
    """

    before: Measures
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()


@one_at_a_time
def measure(
    program: BaseProgram,
    made: Sequence[Made],
    wanted: Calibration,
    seed: int,
    ledger: Ledger,
    tell: Callable[[str], None],
) -> Read:
    """Measure perplexity, agreement and latency of every point, and of the dense model once.

    Args:
        program: the dense one.
        made: the points.
        wanted: what is measured on.
        seed: of the draws.
        ledger: has what an interrupted sweep has measured.
        tell: told of each text.
    """
    before = measures_of(program, program.costs.total())
    points = tuple(one.point for one in made)
    if not is_traced(program):
        return Read(before, points, ("of ONNX files only sizes are measured in a sweep",))
    notes: list[str] = []
    slims = [cast("Slim", one.slim) for one in made]
    modules = [slim.module for slim in slims]
    dense = program.as_module()
    why = unmeasurable(program, wanted)
    if why is not None:
        notes.append(f"no perplexity: {why}")
    else:
        pairs = _pairs(program, dense, modules, wanted, seed, ledger, tell, notes)
        completions = _completions(program, dense, modules, wanted, tell, notes)
        before = replace(before, perplexities={t: found[0].dense for t, found in pairs.items()})
        points = tuple(
            replace(
                point,
                after=replace(
                    point.after, perplexities={t: found[n].slim for t, found in pairs.items()}
                ),
                quality=Quality(
                    {t: found[n].comparison for t, found in pairs.items()}, completions[n]
                ),
            )
            for n, point in enumerate(points)
        )
    tell("measuring latency")
    with attempted("latency", notes):
        before, points = _timed(program, dense, slims, before, points)
    return Read(before, points, tuple(notes))


def _pairs(
    program: Program,
    dense: Callable[..., Any],
    modules: Sequence[Callable[..., Any]],
    wanted: Calibration,
    seed: int,
    ledger: Ledger,
    tell: Callable[[str], None],
    notes: list[str],
) -> dict[str, list[Pair]]:
    """By text, what every point made of it beside the dense model."""
    found: dict[str, list[Pair]] = {}
    tokenizer = tokenizer_for(program, wanted)
    for number, text in enumerate(measured_texts(program, wanted)):
        if tokenizer is None and not text.strict:
            continue
        before = ledger.load(f"text-{number}")
        if before is not None:
            found[text.source] = [_pair(one) for one in before]
            continue
        tell(f"measuring quality on {text.source}")
        with attempted(f"quality on {text.source}", notes):
            windows = evaluation_windows(program, wanted, seed, text)
            try:
                found[text.source] = compare_all(dense, modules, windows)
            except NoPerplexityError as error:
                notes.append(f"no perplexity: {error.why}")
                return {}
            ledger.save(f"text-{number}", [asdict(one) for one in found[text.source]])
    return found


def _pair(data: Any) -> Pair:
    """What an interrupted sweep has measured."""
    dense, slim = (
        Perplexity(**{**data[name], "losses": tuple(data[name]["losses"])})
        for name in ("dense", "slim")
    )
    own = dict(data["comparison"])
    for name in ("ratio", "agreement", "kl"):
        own[name] = None if own[name] is None else Estimate(**own[name])
    return Pair(dense, slim, Comparison(**own))


def _completions(
    program: Program,
    dense: Callable[..., Any],
    modules: Sequence[Callable[..., Any]],
    wanted: Calibration,
    tell: Callable[[str], None],
    notes: list[str],
) -> list[tuple[Completion, ...]]:
    """For every point, what it and the dense model make of the same prompts."""
    tokenizer = tokenizer_for(program, wanted)
    found: list[list[Completion]] = [[] for _ in modules]
    if tokenizer is not None:
        tell("completing prompts")
        with attempted("completions", notes, caught=(Exception,)):  # generate is anybody's code
            for prompt in PROMPTS:
                start = prompt_tokens(tokenizer, prompt)
                tokens = min(TOKENS, program.default_window() - start.shape[1])
                if tokens > 0:
                    first = complete(dense, tokenizer, start, tokens)
                    for own, module in zip(found, modules, strict=True):
                        text = complete(module, tokenizer, start, tokens)
                        own.append(Completion(prompt, first, text))
    return [tuple(own) for own in found]


def _timed(
    program: Program,
    dense: Callable[..., Any],
    slims: Sequence[Slim],
    before: Measures,
    points: Sequence[Point],
) -> tuple[Measures, tuple[Point, ...]]:
    """MACs and latency of the usual call, of all models in turns."""
    modules: list[Callable[..., Any]] = [dense, *(slim.module for slim in slims)]
    call = usual_call(program, modules)
    macs = [program.costs_at(call.workload).total().macs]
    macs += [slim.cost_at(call.workload).macs for slim in slims]
    taken = latencies([call.of(module) for module in modules])
    sides = [
        replace(with_call(side, call, count), torch=replace(latency, macs=count))
        for side, count, latency in zip(
            [before, *(one.after for one in points)], macs, taken, strict=True
        )
    ]
    timed = (replace(point, after=side) for point, side in zip(points, sides[1:], strict=True))
    return sides[0], tuple(timed)


def output_change(
    dense: Callable[..., Any], slim: Callable[..., Any], batches: Sequence[Any]
) -> float:
    """Squared difference of two models' floating-point outputs, in parts of the first's energy."""
    lost = energy = 0.0
    with torch.inference_mode():
        for batch in batches:
            sides = (pytree.tree_leaves(m(*batch.args, **batch.kwargs)) for m in (dense, slim))
            for one, other in zip(*sides, strict=True):
                if isinstance(one, torch.Tensor) and one.is_floating_point():
                    lost += float((one.double() - other.double()).square().sum())
                    energy += float(one.double().square().sum())
    return lost / energy if energy else 0.0
