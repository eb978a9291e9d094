"""Structured pruning with weights that make up for what goes.

`obs` chooses units where their consumers read them and refits the consumers at once, so that every
choice sees the model as it has become. `reconstruct` refits the consumers for a plan, whoever made
it, to what the dense model computes: what a layer lacks because of the layers before it is closed
with the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.passes.repair.refitted import Refitted
from graphprune.passes.repair.refitting import Compensation, Refit, Survey, choose
from graphprune.plan.kept import Units
from graphprune.plan.plan import Plan, Selection
from graphprune.solvers import Reconstruct
from graphprune.solvers.obs import Problem, Surgeon
from graphprune.streaming import (
    Held,
    Sites,
    State,
    Step,
    apply_weights,
    batches,
    find_biases,
    find_sites,
    in_streams,
    stream,
)
from graphprune.streaming.consumers import Consumer, consumers
from graphprune.streaming.core.layout import Experts
from graphprune.streaming.identity import identity


@dataclass(frozen=True)
class Repaired:
    """A dense program whose weights suit a plan.

    Attributes:
        program: at full size; where a weight was refitted, it has zeros in the columns that the
            plan removes.
        plan: to be applied to it.
        layers: one entry per refitted consumer, in the order of treatment.
        untouched: structures of the plan that no refit could help, to the reason.
    """

    program: BaseProgram
    plan: Plan
    layers: tuple[Refitted, ...]
    untouched: Mapping[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is untouched, for people."""
        reasons = Counter(self.untouched.values())
        return tuple(f"{n} of the structures not repaired: {why}" for why, n in reasons.items())


def obs(
    program: BaseProgram,
    samples: Any,
    keep: Mapping[str, int],
    *,
    given: Plan | None = None,
    surgeon: Surgeon | None = None,
    damping: float = 1e-4,
    held: torch.dtype | Held | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Repaired:
    """Choose units by structured optimal brain surgery, and refit what reads them.

    Args:
        program: a program with weights; it isn't changed.
        samples: see `graphprune.streaming.batches`.
        keep: structure name to the number of units that stay (in each outer unit, where the
            structure is ragged).
        given: a plan for other structures, which is settled already; the result holds it too.
        surgeon: how units are chosen.
        damping: see `graphprune.solvers.Reconstruct`.
        held: how activations wait; see `graphprune.streaming.stream`.
        progress: called after each group of weights.
        state: where progress is saved, and goes on from; None saves nothing.

    Raises:
        PlanError: a structure has no consumer that a statistic could see.
        CalibrationError: the statistics don't suffice.
    """
    structures = [program.by_name[name] for name in keep]
    settled = [program.by_name[name] for name in given.kept_units] if given is not None else []
    found, sites = _consumers(program, [*structures, *settled], given)
    missing = [s.name for s in structures if not found[s.name]]
    if missing:
        raise PlanError(
            "obs can't choose units that no weight multiplies by",
            where=missing[0],
            why="its units meet in a product of activations, or what reads them can't be treated",
            hint="choose these by another score",
        )
    surgeon = surgeon or Surgeon()
    units: dict[str, Units] = dict(given.kept_units) if given is not None else {}
    spread = [s for s in structures if len({c.group for c in found[s.name]}) > 1]
    if spread:
        units |= _chosen_together(program, samples, spread, keep, surgeon, damping, held)
    known = find_biases(program, sites.all.values())
    refit = Reconstruct(damping)
    treatment = Refit(program, found, units, dict(keep), surgeon, refit, False, known)
    fixed = Plan(program.fingerprint, dict(units)).bind(program)
    masked = fixed if is_wide([*spread, *settled], found) else None
    return _streamed(program, samples, sites, treatment, held, progress, state, {}, masked)


def read_by(program: BaseProgram, plan: Plan) -> list[str]:
    """The weights that multiply by what a plan prunes."""
    structures = [program.by_name[name] for name in plan.kept_units]
    found = consumers(program, structures, find_sites(program, every=True))
    return list(dict.fromkeys(c.parameter for users in found.values() for c in users))


def reconstruct(
    program: BaseProgram,
    samples: Any,
    plan: Plan,
    *,
    damping: float = 1e-4,
    reference: bool = True,
    held: torch.dtype | Held | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Repaired:
    """Refit the consumers of a plan's structures in closed form.

    Every consumer is fitted, by least squares on the columns that stay, to the output that it has
    with the dense weights on the same inputs. With `reference` the gap to its output in the dense
    model (where it writes into a residual stream, to what the stream lacks) is closed as well, as
    far as held-out samples show that it can be: see `graphprune.solvers.gap`. Other weights that
    write into a residual stream help to close it.

    Args:
        program: a program with weights; it isn't changed.
        samples: see `graphprune.streaming.batches`.
        plan: what stays.
        damping: see `graphprune.solvers.Reconstruct`.
        reference: run the dense model along. It costs another pass. Experts, of which a token may
            choose others in the dense model, are fitted without.
        held: how activations wait; see `graphprune.streaming.stream`.
        progress: called after each group of weights.
        state: where progress is saved, and goes on from; None saves nothing.

    Raises:
        PlanError: the plan doesn't belong to the program, or no consumer can be refitted.
    """
    selection = plan.bind(program)
    structures = [program.by_name[name] for name in plan.kept_units]
    gone = selection.removed_parameters
    names = _reading(program, structures, gone)
    if reference and not _has_experts(find_sites(program, every=True), names):
        names += [n for n in _writing(program, {*names, *gone}, gone) if n not in names]
    else:
        reference = False
    if not names:
        raise _nothing_reads(structures)
    sites = find_sites(program, include=names, every=True)
    found = consumers(program, structures, sites)
    untouched = {
        s.name: "a layer" if s.blocks else "no weight multiplies by its units"
        for s in structures
        if not found[s.name] and not (s.blocks and reference)
    }
    units = dict(plan.kept_units)
    refit = Reconstruct(damping)
    known = find_biases(program, sites.all.values())
    treatment = Refit(program, found, units, {}, Surgeon(), refit, reference, known)
    masked = selection if reference and is_wide(structures, found) else None
    return _streamed(program, samples, sites, treatment, held, progress, state, untouched, masked)


def compensate(
    program: BaseProgram,
    samples: Any,
    plan: Plan,
    *,
    held: torch.dtype | Held | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Repaired:
    """Add to the biases of the consumers what the removed units contribute on average.

    The bias compensation of FLAP (An et al., 2024, arXiv:2312.11983): ``b += W_gone E[x_gone]``,
    with the mean of the dense model. Weights stay as they are.
    `graphprune.frontends.hf.biases.with_biases` gives biases to a model that has none.

    Args:
        program: a program with weights; it isn't changed.
        samples: see `graphprune.streaming.batches`.
        plan: what stays.
        held: how activations wait; see `graphprune.streaming.stream`.
        progress: called after each group of weights.
        state: where progress is saved, and goes on from; None saves nothing.

    Raises:
        PlanError: the plan doesn't belong to the program, or a consumer has no bias.
    """
    plan.bind(program)
    structures = [program.by_name[name] for name in plan.kept_units]
    found, sites = _consumers(program, structures, plan)
    known = find_biases(program, sites.all.values())
    without = [name for name in sites.parameters if name not in known]
    if without:
        raise PlanError(
            "a layer has no bias that could make up for what goes",
            where=without[0],
            why=f"{len(without)} of {len(sites.parameters)} consumers have none",
            hint="repair by reconstruction instead",
        )
    untouched = {
        s.name: "no weight multiplies by its units" for s in structures if not found[s.name]
    }
    units = dict(plan.kept_units)
    treatment = Compensation(program, found, units, {}, Surgeon(), None, False, known)
    result = _streamed(program, samples, sites, treatment, held, progress, state, untouched)
    biases = {name: new.cpu() for name, new in treatment.found.items()}
    return replace(result, program=apply_weights(program, biases))


def _streamed(
    program: BaseProgram,
    samples: Any,
    sites: Sites,
    treatment: Refit,
    held: torch.dtype | Held | None,
    progress: Callable[[Step], None] | None,
    state: State | None,
    untouched: Mapping[str, str],
    selection: Selection | None = None,
) -> Repaired:
    if state is not None:  # another plan is another run
        told = [state.recipe, treatment.units, treatment.keep, treatment.surgeon, treatment.refit]
        state = replace(state, recipe=identity([*told, treatment.closing]))
    new = stream(
        program,
        sites,
        batches(program, samples),
        treatment,
        held=held,
        reference=treatment.reference,
        selection=selection,
        progress=progress,
        state=state,
    )
    sizes = {name: program.by_name[name].size for name in treatment.units}
    plan = Plan(program.fingerprint, treatment.units, sizes).noted(program)
    return Repaired(apply_weights(program, new), plan, tuple(treatment.layers), untouched)


def _consumers(
    program: BaseProgram, structures: Sequence[Structure], plan: Plan | None = None
) -> tuple[dict[str, tuple[Consumer, ...]], Sites]:
    """The consumers of some structures, and the sites of no other weight.

    Args:
        program: the program.
        structures: what is pruned.
        plan: what leaves with the layers that it removes is no consumer.

    Raises:
        PlanError: there is none.
    """
    gone = plan.bind(program).removed_parameters if plan is not None else frozenset()
    names = _reading(program, structures, gone)
    if not names:
        raise _nothing_reads(structures)
    sites = find_sites(program, include=names, every=True)
    return consumers(program, structures, sites), sites


def _reading(
    program: BaseProgram, structures: Sequence[Structure], gone: AbstractSet[str]
) -> list[str]:
    """The consumers of some structures, of the parameters that stay."""
    found = consumers(program, structures, find_sites(program, every=True))
    names = (c.parameter for users in found.values() for c in users)
    return list(dict.fromkeys(name for name in names if name not in gone))


def _writing(program: BaseProgram, after: AbstractSet[str], gone: AbstractSet[str]) -> list[str]:
    """What stays and writes into residual streams, from the first of some parameters on."""
    usual = frozenset(find_sites(program).parameters)
    everything = find_sites(program, every=True)
    writers = (in_streams(program, everything) & usual) - gone
    places = [g.index for g in everything.groups if not after.isdisjoint(g.parameters)]
    late = everything.groups[min(places, default=len(everything.groups)) :]
    return [n for group in late for n in group.parameters if n in writers]


def _nothing_reads(structures: Sequence[Structure]) -> PlanError:
    return PlanError(
        "no weight multiplies by what is pruned",
        where=", ".join(s.name for s in structures[:3]),
        hint="leave the repair out",
    )


def _chosen_together(
    program: BaseProgram,
    samples: Any,
    structures: Sequence[Structure],
    keep: Mapping[str, int],
    surgeon: Surgeon,
    damping: float,
    held: torch.dtype | Held | None,
) -> dict[str, Units]:
    """Units of structures whose consumers stand at several places, by the dense model.

    The first consumer is reached before the last has been seen.
    """
    found, sites = _consumers(program, structures)
    known = find_biases(program, sites.all.values())
    units: dict[str, Units] = {}

    def decide(structure: Structure, problems: list[Problem]) -> None:
        units[structure.name] = choose(surgeon, problems, structure, keep[structure.name])

    survey = Survey(program, found, known, damping, decide)
    stream(program, sites, batches(program, samples), survey, held=held)
    return units


def is_wide(structures: Sequence[Structure], found: Mapping[str, tuple[Consumer, ...]]) -> bool:
    """Whether zeros in the consumers don't amount to the cut.

    Layers go whole, and an axis with consumers at several places is a residual stream, whose
    norms see fewer channels. What is read at one place has no effect but through its consumers.
    """
    return any(s.blocks or len({c.group for c in found[s.name]}) > 1 for s in structures)


def _has_experts(sites: Sites, names: Sequence[str]) -> bool:
    """Whether some weight is a stack of experts: two models send a token to different ones."""
    own = (s for g in sites.groups for s in g.sites if s.parameter in names)
    return any(isinstance(s.layout, Experts) for s in own)


__all__ = ["Refitted", "Repaired", "compensate", "obs", "reconstruct"]
