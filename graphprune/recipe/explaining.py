"""What a recipe will do, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graphprune.recipe.named import AUTO, UNREPAIRED
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.rules import changed
from graphprune.recipe.selection import Selection
from graphprune.recipe.sparsify import Sparsify
from graphprune.recipe.steps import PASSES, Planned, Replayed

_RESOURCES = {"params": "parameters", "macs": "multiply-accumulates", "bytes": "bytes of weights"}

_SCORES = {
    AUTO: "Which units go is decided on data while the weights that read them are refitted (score "
    "obs), where the model can be calibrated; otherwise by the size of their weights.",
    "obs": "Which units go is decided one by one, by what the layers that read them would lose; "
    "these layers are refitted at once (score obs).",
}
_EFFORTS = {
    "fast": "Units are ranked by a score, and no weight is changed (effort fast).",
    "usual": "Units are chosen while the weights that read them are refitted (effort usual).",
    "balanced": "Then each block is trained on what the dense block computes (effort balanced).",
    "best": "Then each block is trained on what the dense block computes, and all weights learn "
    "from the dense model (effort best).",
}


def explain(recipe: Recipe) -> list[str]:
    """Sentences, in the order in which things are done.

    Args:
        recipe: the recipe.
    """
    found: list[str] = []
    for one in recipe.passes:
        turn = one.round
        if turn.number == 1:
            told = list(_pass(one))
            if turn.of > 1:
                told.append(f"This is done in {turn.of} rounds, a part of the way in each.")
            found += told
    if recipe.steps is None and recipe.removes and recipe.repair.name == AUTO:
        found.append(
            "Layers that read what has gone may be refitted afterwards, where that helps (repair "
            "auto)."
        )
    elif recipe.steps is None and recipe.removes and recipe.repair.name in UNREPAIRED:
        found.append("Nothing else makes up for what has gone (repair none).")
    if recipe.effort is not None:
        found.append(_EFFORTS[recipe.effort])
    elif recipe.target is not None and recipe.leaves_training:
        found.append(
            "Where that takes more than half of some role from a language model, all weights "
            "learn from the dense model on the same data for a while (effort usual goes without)."
        )
    if recipe.control:
        found.append(
            "What training is compared with is made and measured too, but not written (control)."
        )
    return [*found, *_data(recipe), *_proof(recipe), *_written(recipe)]


def _pass(one: Planned) -> Iterable[str]:
    options = one.options
    if isinstance(options, Selection):
        yield from _selection(options)
    elif isinstance(options, Replayed):
        yield f"The units that the plan {options.plan} names stay; all others are removed."
    elif isinstance(options, Sparsify):
        yield from _masks(options)
    elif one.name == "repair":
        yield f"The layers that read what has gone are refitted by {options.name}."
    else:
        yield from _other(one)


def _selection(options: Selection) -> Iterable[str]:
    if options.remove is not None:
        parts = [f"{_percent(share)} of {_role(role)}" for role, share in options.remove.items()]
        yield f"Removes {_joined(parts)}."
    if options.target is not None:
        ((resource, budget),) = options.target.items()
        what = _RESOURCES[resource]
        most = f"{_percent(budget)} of the {what}" if budget <= 1 else f"{budget:,} {what}"
        yield f"Removes units until at most {most} are left."
    if options.shape is not None:
        sizes = [f"{size:,} {role}" for role, size in options.shape.items()]
        yield f"Cuts the model to exactly {_joined(sizes)}."
    score = options.score.name
    extra = dict(options.score.model_extra or {})
    given = f" with {_options(extra)}" if extra else ""
    yield _SCORES.get(score, f"Units are ranked by score {score}{given}; the lowest go.")
    if options.shape is None:
        yield (
            "Every layer loses the same share."
            if options.uniform
            else "Units of all layers are ranked together, so that some layers lose more."
        )
    if options.include:
        yield f"Only {_joined(options.include)} may be pruned."
    if options.exclude:
        yield f"{_joined(options.exclude)} stay whole."
    align = {role: size for role, size in options.align.items() if size != 1}
    if align:
        named = {role: "all widths" if role == "*" else role for role in align}
        sizes = [f"{size} ({named[role]})" for role, size in align.items()]
        yield f"What stays is a multiple of {_joined(sizes)}."
    if options.minimum != 1:
        least = _percent(options.minimum) if options.minimum < 1 else f"{options.minimum:,} units"
        yield f"Every structure keeps at least {least}."


def _masks(options: Sparsify) -> Iterable[str]:
    if options.pattern is not None:
        kept, of = options.pattern.split(":")
        what = f"Of every {of} weights {kept} stay and the others become"
    else:
        what = f"{_percent(options.sparsity or 0.0)} of the single weights become"
    yield f"{what} zero, chosen by {options.method}; shapes stay as they are."
    if options.budget.name != "uniform":
        yield f"How many of each layer is settled by {options.budget.name}."
    if options.bits is not None:
        yield f"Kept weights are rounded to {options.bits} bits as well."
    if options.reference:
        yield "Later layers make up for what the dense model did (reference)."
    if options.include:
        yield f"Only weights of {_joined(options.include)} become zero."
    if options.exclude:
        yield f"No weight of {_joined(options.exclude)} becomes zero."


def _other(one: Planned) -> Iterable[str]:
    """A pass that trains, or of another package: what it says of itself, and its options."""
    doc = (PASSES.find(one.name).__doc__ or "").strip().splitlines()
    told = doc[0].rstrip(".") if doc else f"Runs {one.name}"
    options = one.options
    if not isinstance(options, Mapping):
        options = changed(options)
    shown = f", with {_options(options)}" if options else ""
    yield f"{one.name}: {told[:1].lower()}{told[1:]}{shown}."


def _data(recipe: Recipe) -> Iterable[str]:
    wanted = recipe.calibration
    open_ = any(s.score.name == AUTO for s in recipe.selections)
    if recipe.needs_data or open_:
        if wanted.data is None:
            yield (
                "No data is named: language models are calibrated on general text, half of it "
                "built in and half written by the model itself; others go without."
            )
        else:
            names = _joined(wanted.sources) if isinstance(wanted.data, Mapping) else wanted.data
            count = f", {wanted.windows} windows of it" if wanted.windows else ""
            yield f"It is calibrated on {names}{count}."
    else:
        yield "No calibration data is read."
    if wanted.text:
        yield f"A language model is measured on {_joined(wanted.text)}."


def _proof(recipe: Recipe) -> Iterable[str]:
    yield "The slim model is compared with the masked dense one before anything is written."
    if recipe.fail_if:
        yield f"Nothing is written if {_joined(recipe.fail_if, 'or')}."


def _written(recipe: Recipe) -> Iterable[str]:
    if "formats" in recipe.model_fields_set:
        yield f"Writes {_joined(recipe.formats)}."
    else:
        yield "Writes a checkpoint for a checkpoint, ONNX for ONNX, and pt2 for anything else."
    if recipe.native == "require":
        yield "A checkpoint that plain transformers can't open is refused."
    yield f"The random seed is {recipe.seed}."


def _role(name: str) -> str:
    return "the units of every prunable role" if name == "*" else name


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _options(options: Mapping[str, Any]) -> str:
    return _joined([f"{name} {value}" for name, value in options.items()])


def _joined(items: Iterable[object], word: str = "and") -> str:
    found = [str(one) for one in items]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} {word} {found[-1]}"
