"""Structured brain surgery for several sizes at once, with one pass over the dense model.

`graphprune.passes.repair.structured.obs` sees each layer in the model as pruned so far, so that
another size is another pass. Here every layer is seen as it is in the dense model: one statistic
and one greedy descent serve all sizes, and only the refits are made for each. What a sweep compares
costs little more than its smallest size that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.files import replacing
from graphprune.passes.repair.refitting import Refit
from graphprune.passes.repair.structured import Repaired, is_wide
from graphprune.passes.shared.gaps import Gathered, gathered
from graphprune.plan.kept import Units
from graphprune.plan.plan import Plan
from graphprune.solvers import Reconstruct
from graphprune.solvers.obs import Surgeon
from graphprune.streaming import (
    Batch,
    Group,
    Observer,
    State,
    Step,
    apply_weights,
    batches,
    find_biases,
    find_sites,
    stream,
)
from graphprune.streaming.consumers import Consumer, consumers
from graphprune.streaming.core.weights import damaged
from graphprune.streaming.identity import identity

PLENTY = 16
"""Tokens for each input of a layer from which on a refit learns nothing by chance: what a fit to
one half of the samples does on the other isn't looked at then."""

SMALL = 64
"""Units of a structure up to which the local search follows the descent: it takes as long again for
every size, and hardly changes what has more."""


@dataclass(frozen=True)
class Size:
    """One of several sizes of a model.

    Attributes:
        keep: structure name to the number of units that stay, as `structured.obs` takes it.
        given: a plan for other structures, which is settled already.
    """

    keep: Mapping[str, int]
    given: Plan | None = None

    @property
    def structures(self) -> tuple[str, ...]:
        """The names of all structures that lose units."""
        return (*self.keep, *(self.given.kept_units if self.given is not None else ()))


def can_share(program: BaseProgram, size: Size) -> bool:
    """Whether statistics of the dense model serve a size.

    They don't where layers or channels of the residual stream go: what every later layer reads
    changes with these, norms included. Neither where a structure has nothing to be chosen by.
    """
    structures = [program.by_name[name] for name in size.structures]
    found = consumers(program, structures, find_sites(program, every=True))
    return not is_wide(structures, found) and all(found[name] for name in size.keep)


def obs_together(
    program: BaseProgram,
    samples: Any,
    sizes: Sequence[Size],
    *,
    surgeon: Surgeon | None = None,
    damping: float = 1e-4,
    folder: Path | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> tuple[Repaired, ...]:
    """Choose units for several sizes, and refit what reads them, on statistics of the dense model.

    Args:
        program: a program with weights; it isn't changed.
        samples: see `graphprune.streaming.batches`.
        sizes: for which `can_share` holds.
        surgeon: how units are chosen.
        damping: see `graphprune.solvers.Reconstruct`.
        folder: where new weights wait, in files; None keeps them in memory.
        progress: called after each group of weights.
        state: where progress is saved, and goes on from; it takes a `folder`.

    Returns:
        What `structured.obs` returns, for each size.

    Raises:
        CalibrationError: the statistics don't suffice.
        PlanError: see `structured.obs`.
    """
    names = dict.fromkeys(name for size in sizes for name in size.structures)
    structures = [program.by_name[name] for name in names]
    every = consumers(program, structures, find_sites(program, every=True))
    reading = dict.fromkeys(c.parameter for users in every.values() for c in users)
    sites = find_sites(program, include=list(reading), every=True)
    found = consumers(program, structures, sites)
    known = find_biases(program, sites.all.values())
    surgeon, refit = surgeon or Surgeon(), Reconstruct(damping)
    refits = [
        Refit(program, {n: found[n] for n in size.structures},
              {} if size.given is None else dict(size.given.kept_units),
              dict(size.keep), surgeon, refit, False, known)
        for size in sizes
    ]  # fmt: skip
    data = batches(program, samples)
    treatment = Together(program, refits, surgeon, folder, tokens=_tokens(data))
    if state is not None:
        told = [state.recipe, [[one.units, one.keep] for one in refits], surgeon, refit, SMALL]
        state = replace(state, recipe=identity(told))
    stream(program, sites, data, treatment, progress=progress, state=state)
    return tuple(
        _repaired(program, one, new) for one, new in zip(refits, treatment.found, strict=True)
    )


def _tokens(data: Sequence[Batch]) -> int:
    """Tokens of all samples, where these are windows of them; 0 where they are something else."""
    leaves = [[leaf for leaf in one.leaves() if isinstance(leaf, Tensor)] for one in data]
    if not all(len(found) == 1 and not found[0].is_floating_point() for found in leaves):
        return 0
    return sum(found[0].numel() for found in leaves)


def _repaired(program: BaseProgram, refit: Refit, new: Mapping[str, Tensor]) -> Repaired:
    sizes = {name: program.by_name[name].size for name in refit.units}
    plan = Plan(program.fingerprint, refit.units, sizes).noted(program)
    return Repaired(apply_weights(program, new), plan, tuple(refit.layers), {})


@dataclass
class Together:
    """Changes nothing on the way; makes the new weights of every size at each group.

    Attributes:
        program: the dense program.
        refits: what is done for each size.
        surgeon: how units are chosen.
        folder: where new weights wait; None keeps them in memory.
        tokens: of all samples; 0 where nobody knows.
        found: the new weights of each size.
    """

    program: BaseProgram
    refits: Sequence[Refit]
    surgeon: Surgeon
    folder: Path | None = None
    tokens: int = 0
    found: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.found = [{} for _ in self.refits]

    def observer(self, group: Group, part: int) -> Gathered:
        """A new observer for one part of a group: a layer, an expert or a group of channels."""
        widest = max(max(self.program.parameters[name]) for name in group.parameters)
        plenty = group.parts == 1 and self.tokens >= PLENTY * widest
        return gathered(group, part, 1 if plenty else 2)

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Make the new weights of every size; none is changed here."""
        statistics = [cast("Gathered", one) for one in observers]
        for name in dict.fromkeys(n for one in self.refits for n in one.consumers):
            self._choose(name, group, statistics, weights)
        made = [dict(one.treat(group, observers, weights)) for one in self.refits]
        if self.folder is None:
            for found, new in zip(self.found, made, strict=True):
                found.update(new)
        else:
            self._write(group, made)
            self._read(group)
        return ()

    def record(self, group: Group) -> Any:
        """What was decided for a group, as JSON data."""
        return [one.record(group) for one in self.refits]

    def recall(self, group: Group, record: Any) -> None:
        """Take up a decision of an interrupted run."""
        for one, own in zip(self.refits, record, strict=True):
            one.recall(group, own)
        self._read(group)

    def _choose(
        self,
        name: str,
        group: Group,
        statistics: Sequence[Gathered],
        weights: Mapping[str, Tensor],
    ) -> None:
        """Choose the units of a structure for all sizes for which they are still open."""
        structure = self.program.by_name[name]
        outer = structure.within.size if structure.within is not None else 1
        surgeon = self.surgeon
        if outer * structure.size > SMALL:
            surgeon = replace(surgeon, rounds=0)
        for alike in self._alike(name, group):
            first = alike[0]
            problems = [
                problem
                for consumer in _here(first, name, group)
                for problem in first.problems(group, consumer, statistics, weights)
            ]
            keeps = {one.keep[name] for one in alike}
            chosen = surgeon.choose_each(problems, structure.size, keeps, outer)
            for one in alike:
                rows = (chosen[one.keep[name]] % structure.size).tolist()
                kept = tuple(tuple(row) for row in rows)
                one.units[name] = cast("Units", kept if structure.within is not None else kept[0])

    def _alike(self, name: str, group: Group) -> list[list[Refit]]:
        """The sizes for which a structure is open here, by the columns that they have left."""
        found: dict[bytes, list[Refit]] = {}
        for one in self.refits:
            here = _here(one, name, group)
            if here and name not in one.units:
                left = [np.ascontiguousarray(one.kept(group, c.parameter)) for c in here]
                found.setdefault(b"".join(mask.tobytes() for mask in left), []).append(one)
        return list(found.values())

    def _file(self, group: Group) -> Path:
        assert self.folder is not None
        return self.folder / f"sizes-{group.index:05}.safetensors"

    def _write(self, group: Group, made: Sequence[Mapping[str, Tensor]]) -> None:
        named = {f"{n}/{p}": t.contiguous() for n, new in enumerate(made) for p, t in new.items()}
        self._file(group).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file(group)) as temporary:
            save_file(named, temporary)

    def _read(self, group: Group) -> None:
        """Take the new weights of a group from its file, which is mapped and not read."""
        try:
            stored = load_file(self._file(group))
        except (SafetensorError, OSError) as error:
            raise damaged(self._file(group), error) from error
        for place, tensor in stored.items():
            number, _, parameter = place.partition("/")
            self.found[int(number)][parameter] = tensor


def _here(refit: Refit, name: str, group: Group) -> list[Consumer]:
    return [c for c in refit.consumers.get(name, ()) if c.group == group.index]
