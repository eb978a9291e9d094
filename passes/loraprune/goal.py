"""From scores to how many units of each structure stay, by the solver of every selection."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.passes.loraprune.options import Pruning
from graphprune.passes.loraprune.units import Gone
from graphprune.passes.scores.random_score import Random
from graphprune.passes.selection.select import select
from graphprune.passes.shared.score import Inputs, Score
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray

_LEAST = 1e-300
"""Of a unit that is still there: it goes after those that have gone already."""


@dataclass(frozen=True)
class Trial:
    """Random scores for what a goal asks about, to find out which structures that is.

    Attributes:
        weights: canonical names of those that have an adapter.
        asked: the structures that were asked about, by name.
    """

    weights: Collection[str]
    asked: dict[str, Structure] = field(default_factory=dict)

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`."""
        self.asked.update({s.name: s for s in structures})
        return Random().score(program, structures, inputs)

    def unjudged(self, program: BaseProgram, structures: Sequence[Structure]) -> dict[str, str]:
        """Those that no adapter tells anything of."""
        return _unseen(program, structures, self.weights)


@dataclass(frozen=True)
class Averaged:
    """Scores that a training has gathered.

    Attributes:
        weights: canonical names of those that have an adapter.
        scores: structure name to the score of each unit.
        gone: structure name to bool of the same shape: True where a unit has gone already.
    """

    weights: Collection[str]
    scores: Mapping[str, FloatArray]
    gone: Mapping[str, Gone]

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`."""
        return {
            s.name: np.where(self.gone[s.name], 0, np.maximum(self.scores[s.name], _LEAST))[None]
            for s in structures
        }

    def unjudged(self, program: BaseProgram, structures: Sequence[Structure]) -> dict[str, str]:
        """Those that no adapter tells anything of."""
        return _unseen(program, structures, self.weights)


def solved(program: BaseProgram, pruning: Pruning, score: Score, notes: list[str]) -> Plan:
    """The plan that a goal and scores make.

    Raises:
        PlanError: see `graphprune.select`.
    """
    return select(
        program,
        **pruning.goal,
        score=score,
        exclude=pruning.exclude,
        include=pruning.include,
        uniform=pruning.uniform,
        align=pruning.align,
        minimum=pruning.minimum,
        normalize=pruning.normalize,
        seed=pruning.seed,
        notes=[],
        told=lambda note: notes.append(note) if note not in notes else None,
    )


def _unseen(
    program: BaseProgram, structures: Sequence[Structure], weights: Collection[str]
) -> dict[str, str]:
    own = program.aliases
    return {
        s.name: "LoRAPrune judges units by adapters, and no weight of it has one"
        for s in structures
        if not any(own.get(p, p) in weights for p, _ in s.members)
    }
