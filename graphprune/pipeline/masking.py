"""The stage of a compilation that makes single weights zero, and what it tells of them."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.calibrate import calibration_samples
from graphprune.calibration.result import Samples
from graphprune.calibration.sources.amounts import WEIGHTS
from graphprune.emit.written import check_written
from graphprune.errors import LoadError
from graphprune.ir.onnx.feeds import random_feeds
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import Program
from graphprune.passes.masks.oneshot import Sparse, sparsify
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.sparsify import Sparsify
from graphprune.report.masks import MaskedLayer, Masks
from graphprune.report.report import Report
from graphprune.rewrite.retrace import retrace
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.streaming import Batch, Held, State, Step, apply_weights, batches, find_sites


@dataclass(frozen=True)
class Masked:
    """What the stage gives back.

    Attributes:
        program: the dense program with the new weights where its plan leaves them; what the plan
            removes is as it was, so that the masked model still is an oracle for the cut.
        weights: the new weights as they are to be written, by the names of the slim model.
        masks: for the report.
    """

    program: BaseProgram
    weights: Mapping[str, Tensor]
    masks: Masks


def check_masks(program: BaseProgram, recipe: Recipe) -> None:
    """See that the masks of a recipe are possible, before anything is computed.

    Raises:
        PlanError: there is nothing to treat, or a glob means nothing.
    """
    if recipe.sparsify is not None:
        find_sites(program, recipe.sparsify.include, recipe.sparsify.exclude)


def mask(
    program: BaseProgram,
    slim: Slim | SlimOnnx,
    recipe: Recipe,
    samples: Samples,
    *,
    progress: Callable[[str], None],
    state: State | None = None,
) -> Masked:
    """Prune single weights of a slim model.

    Args:
        program: the dense program.
        slim: what a plan, which may be empty, made of it.
        recipe: with a section ``sparsify``, whose globs are of the dense model's parameters.
        samples: see `samples_for`.
        progress: told of each group of weights.
        state: where progress is saved.

    Raises:
        GraphPruneError: see `graphprune.sparsify`.
    """
    section = recipe.sparsify
    assert section is not None
    current, include, exclude = program, section.include, section.exclude
    reasons: Mapping[str, str] = {}
    if slim.plan.kept_units:
        sites = find_sites(program, include, exclude)
        current, renamed = retrace(slim), slim.renamed
        include = tuple(renamed[n] for n in sites.parameters if n in renamed)
        exclude = ()
        reasons = {renamed[n]: why for n, why in sites.skipped.items() if n in renamed}
    dtype = getattr(torch, section.held)
    folder = None
    if section.offload:
        folder = Path(tempfile.gettempdir()) if state is None else Path(state.directory)
        folder.mkdir(parents=True, exist_ok=True)  # a layer budget's pass comes before the state's
    found = sparsify(
        cast("Program", current),
        samples.data,
        section.solver(),
        section.wanted(),
        budget=section.budget.built(),
        keep_zeros=section.keep_zeros,
        reference=section.reference,
        errors=section.errors and section.needs_data,
        include=include,
        exclude=exclude,
        held=Held(None if dtype is torch.float32 else dtype, folder),
        progress=_Steps(progress, section.budget.name),
        state=state,
    )
    changed = (*(e.parameter for e in found.layers), *found.reordered)
    weights = {name: found.program.weights[name].detach() for name in changed}
    result: BaseProgram = found.program
    if slim.plan.kept_units:
        result = written_back(slim, weights)
    return Masked(result, weights, _masks(section, found, {**found.skipped, **reasons}, samples))


def planned(program: BaseProgram, slim: Slim | SlimOnnx, recipe: Recipe) -> Masks:
    """What a recipe's masks would treat and leave alone; no data is read, no weight computed.

    Raises:
        PlanError: there is nothing to treat, or a glob means nothing.
    """
    section = recipe.sparsify
    assert section is not None
    sites = find_sites(program, section.include, section.exclude)
    renamed = slim_names(slim)
    target = section.sparsity if section.budget.name == "uniform" else None
    if section.pattern is not None:
        kept, of = map(int, section.pattern.split(":"))
        target = 1 - kept / of
    layers = tuple(
        MaskedLayer(renamed[name], tuple(slim.shapes[renamed[name]]), target)
        for name in sites.parameters
        if name in renamed
    )
    skipped = {renamed[n]: why for n, why in sites.skipped.items() if n in renamed}
    return Masks(_method(section), _asked(section), layers, skipped, bits=section.bits)


def samples_for(
    program: BaseProgram, recipe: Recipe, tell: Callable[[str], None] = lambda stage: None
) -> Samples:
    """What a recipe's masks are calibrated on; the example inputs where no method looks at data.

    Args:
        program: the dense model.
        recipe: with a section ``sparsify``.
        tell: told how far the model is, if it writes its own data.

    Raises:
        GraphPruneError: see `graphprune.calibration.calibrate.calibration_samples`.
    """
    assert recipe.sparsify is not None
    if recipe.sparsify.needs_data:
        return calibration_samples(program, recipe.calibration, recipe.seed, WEIGHTS, tell)
    data: Any = [random_feeds(program)] if isinstance(program, OnnxProgram) else None
    if isinstance(program, Program):
        data = [Batch(*program.example)]
    return Samples(data, "the example inputs", "arrays", 1)


def together(program: BaseProgram, samples: Samples) -> Samples:
    """Samples in batches of the size that a graph has fixed; as they are where it hasn't.

    Raises:
        LoadError: they don't fill one batch.
    """
    sizes = {i.shape[0] for i in program.signature() if i.shape}
    size = sizes.pop() if len(sizes) == 1 else None
    if size in (None, 1) or isinstance(samples.data, list | tuple):
        return samples
    assert size is not None
    count = samples.count // size * size
    if not count:
        raise LoadError(
            "there are fewer samples than the model takes at a time",
            where=samples.source,
            why=f"{samples.count}, and its batches have {size}",
            hint="give more samples, or export the model with a dynamic batch",
        )
    given = samples.data
    first = (
        {n: v[:count] for n, v in given.items()} if isinstance(given, Mapping) else given[:count]
    )
    notes = samples.notes
    if count < samples.count:
        left = samples.count - count
        notes += (f"the model takes {size} samples at a time: the last {left} are left out",)
    return replace(samples, data=batches(program, first, size), count=count, notes=notes)


def written_back(slim: Slim | SlimOnnx, weights: Mapping[str, Tensor]) -> BaseProgram:
    """The dense program of a slim model with new weights where the plan leaves something.

    Args:
        slim: the slim model.
        weights: slim name to tensor of the slim shape.
    """
    program = slim.program
    kept = slim.plan.kept(program) if slim.plan.kept_units else {}
    new = {}
    for old, name in slim_names(slim).items():
        if name not in weights or old in program.aliases:
            continue
        weight = weights[name]
        if tuple(weight.shape) != program.parameters[old]:
            places = (torch.from_numpy(i) for i in kept[old])
            whole = program.weights[old].detach().clone()
            whole[torch.meshgrid(*places, indexing="ij")] = weight.to(whole)
            weight = whole
        new[old] = weight.to(program.weights[old].dtype)
    return apply_weights(program, new)


def counted(report: Report, path: Path, form: str, slim: Slim | SlimOnnx, masked: Masked) -> Report:
    """The report with the zeros that a written file was found to have.

    Raises:
        VerifyError: it doesn't hold the masked weights as they are.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in (slim.aliases if isinstance(slim, Slim) else {}).items():
        names[name].append(alias)
    found = check_written(path, form, masked.weights, names)
    masks = report.masks or masked.masks
    places = {**masks.places, **({form: found.places} if found.places else {})}
    others = (masked.weights[name] for name in masks.reordered)
    zeros = found.zeros - sum(w.numel() - int(w.count_nonzero()) for w in others)
    checked = {**(masks.checked or {}), form: zeros}
    return replace(report, masks=replace(masks, checked=checked, places=places))


def slim_names(slim: Slim | SlimOnnx) -> Mapping[str, str]:
    """Canonical dense names to the names of the slim model's canonical tensors."""
    return {n: s for n, s in slim.renamed.items() if n not in slim.program.aliases}


class _Steps:
    """Tells of groups: in a first pass, if the layer budget needs one, and in that of the masks."""

    def __init__(self, tell: Callable[[str], None], budget: str) -> None:
        self.tell = tell
        self.passes = ["pruning weights"]
        if budget in ("owl", "sensitivity"):
            self.passes.insert(0, "looking for the layers' budgets")
        self.last = -1

    def __call__(self, step: Step) -> None:
        if step.group.index <= self.last and len(self.passes) > 1:
            del self.passes[0]
        self.last = step.group.index
        done = ", as before" if step.restored else ""
        self.tell(
            f"{self.passes[0]}: group {step.group.index + 1} of {step.total}{done}, "
            f"{step.group.name}"
        )


def _masks(section: Sparsify, found: Sparse, skipped: Mapping[str, str], samples: Samples) -> Masks:
    shapes = found.program.parameters
    layers = tuple(
        MaskedLayer(
            e.parameter,
            tuple(shapes[e.parameter]),
            e.target,
            sparsity=e.sparsity,
            zeros=e.zeros,
            error=e.error,
            notes=e.notes,
        )
        for e in found.layers
    )
    return Masks(
        _method(section),
        _asked(section),
        layers,
        dict(skipped),
        sparsity=found.sparsity,
        sparsity_of_model=found.sparsity_of_model,
        bits=section.bits,
        samples=samples.described() if section.needs_data else None,
        reordered=found.reordered,
    )


def _method(section: Sparsify) -> str:
    options = ", ".join(f"{k} {v}" for k, v in (section.model_extra or {}).items())
    return f"{section.method} ({options})" if options else section.method


def _asked(section: Sparsify) -> str:
    if section.pattern is not None:
        kept, of = section.pattern.split(":")
        asked = f"{section.pattern}, {kept} kept of every {of}"
    else:
        assert section.sparsity is not None
        asked = f"{100 * section.sparsity:g} % of the weights"
    if section.budget.name != "uniform":
        options = ", ".join(f"{k} {v}" for k, v in (section.budget.model_extra or {}).items())
        asked += f", dealt by {section.budget.name}" + (f" ({options})" if options else "")
    asked += ", zeros kept" if section.keep_zeros else ""
    return asked + (", the gap to the dense model closed" if section.reference else "")
