"""The pass ``sparsify``: single weights of what the plan leaves become zero."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.sources.amounts import WEIGHTS, Amount
from graphprune.ir.torch.program import Program
from graphprune.passes.masks.oneshot import sparsify
from graphprune.passes.protocol import Context, Record, State
from graphprune.pipeline.steps.mask_report import plan_masks, report_masks
from graphprune.pipeline.steps.numbering import places_of, written_back
from graphprune.pipeline.steps.samples import example_samples, together
from graphprune.pipeline.steps.told import EachMaskedGroup
from graphprune.recipe.sparsify import Sparsify
from graphprune.rewrite.apply import apply, uncut
from graphprune.rewrite.retrace import retrace
from graphprune.streaming import Held, find_sites
from graphprune.streaming.core.weights import Lazily


@dataclass(frozen=True)
class Sparsified:
    """Prune single weights by a mask method.

    Weights are treated as they stand in the slim model, so that statistics are those of what is
    written, and put back into the dense one: the masked model stays the oracle of the cut.

    Attributes:
        options: the method and how much goes; globs are of the dense model's parameters.
    """

    options: Sparsify

    @property
    def amount(self) -> Amount | None:
        """How much data it takes."""
        return WEIGHTS if self.options.needs_data else None

    def check(self, state: State, context: Context) -> None:
        """See that there is something to treat.

        Raises:
            PlanError: there is nothing, or a glob means nothing.
        """
        find_sites(state.program, self.options.include, self.options.exclude)

    def run(self, state: State, context: Context) -> State:
        """Prune.

        Raises:
            GraphPruneError: see `graphprune.sparsify`.
        """
        section = self._of_round(context)
        program = state.program
        given = context.samples(WEIGHTS) if section.needs_data else None
        samples = together(program, given or example_samples(program))
        current, include, exclude = program, section.include, section.exclude
        reasons: Mapping[str, str] = {}
        slim = None
        if state.plan.kept_units:
            with context.stage("cutting"):
                slim = apply(program, state.plan, folder=_folder(context))
            context.prove(program, state.plan, slim)
            sites, renamed = find_sites(program, include, exclude), slim.renamed
            current = retrace(slim)
            include = tuple(renamed[n] for n in sites.parameters if n in renamed)
            exclude = ()
            reasons = {renamed[n]: why for n, why in sites.skipped.items() if n in renamed}
        with context.stage("pruning weights"):
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
                held=self._held(context),
                progress=EachMaskedGroup(context.progress, section.budget.name),
                state=context.journal(),
            )
        treated = [layer.parameter for layer in found.layers]
        result: BaseProgram = found.program
        if slim is not None:
            changed = (*treated, *found.reordered)
            weights = found.program.weights
            new = Lazily(changed, lambda name: weights[name].detach())
            result = written_back(slim, new, _folder(context))
            dense = {name: old for old, name in slim.renamed.items()}
            treated = [dense[name] for name in treated]
        masks = _masks(state, result, treated)
        details = report_masks(section, found, {**found.skipped, **reasons}, samples)
        record = Record("sparsify", samples.notes, details)
        return replace(state, program=result, masks=masks, unfitted=None).recorded(record)

    def preview(self, state: State, context: Context) -> State:
        """Find what would be treated."""
        slim = uncut(state.program, state.plan)
        details = plan_masks(state.program, slim, self._of_round(context))
        return state.recorded(Record("sparsify", (), details))

    def describe(self, state: State) -> str:
        """One line."""
        return f"make weights zero by {self.options.method}"

    def _of_round(self, context: Context) -> Sparsify:
        """The options of one round: kept shares fall in equal ratios, and zeros stay zeros."""
        turn, section = context.round, self.options
        if turn.of == 1:
            return section
        changes: dict[str, object] = {"keep_zeros": section.keep_zeros or turn.number > 1}
        if section.sparsity is not None:
            changes["sparsity"] = 1 - (1 - section.sparsity) ** turn.share
        return section.model_copy(update=changes)

    def _held(self, context: Context) -> Held:
        dtype = getattr(torch, self.options.held)
        folder = None
        if self.options.offload:
            folder = _folder(context)
        return Held(None if dtype is torch.float32 else dtype, folder)


def _folder(context: Context) -> Path:
    """Where files go that are gone with the process: beside the output, if there is one."""
    state = context.journal()
    folder = Path(tempfile.gettempdir()) if state is None else Path(state.directory)
    folder.mkdir(parents=True, exist_ok=True)  # the run itself comes later
    return folder


def _masks(state: State, program: BaseProgram, treated: Iterable[str]) -> Mapping[str, Tensor]:
    """Which weights stay, of all that have been treated; what the plan removes counts as staying.

    Masks of a large model are as large as half of it, and few passes look at them: each is read off
    the weight when it is asked for.
    """
    kept = state.plan.kept(state.program) if state.plan.kept_units else {}
    earlier, new = state.masks, frozenset(treated)

    def read(name: str) -> Tensor:
        if name not in new:
            return earlier[name]
        weight = program.weights[name].detach()
        if name not in kept:
            return weight != 0
        places = places_of(kept[name])
        mask = torch.ones(weight.shape, dtype=torch.bool)
        mask[places] = weight[places] != 0
        return mask

    return Lazily((*earlier, *sorted(new)), read)
