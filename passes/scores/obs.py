"""Optimal brain surgery as a score: what the layers that read a unit would lose with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.passes.shared.judging import unread
from graphprune.passes.shared.score import Inputs
from graphprune.plan.units import FloatArray


@dataclass(frozen=True)
class Obs:
    """Rise of the relative output error when units go one after another and the rest makes up.

    The greedy descent of structured optimal brain surgery (ZipLM, Kurtic et al., 2023,
    arXiv:2302.04089) on the layers that read a structure, with statistics of the dense model. The
    k-th unit to go scores the largest rise so far, in parts of the energy of the layers' outputs,
    so that structures compare without normalisation.

    `graphprune.passes.repair.structured.obs` goes further: it chooses each structure's units in the
    model as pruned so far, with a local search, and refits the layers; `graphprune.compile` takes
    it wherever the score is obs.

    Attributes:
        damping: of the Hessian, in units of the mean of its diagonal.
        steps: see `graphprune.solvers.obs.Surgeon`.
    """

    needs_data: ClassVar[bool] = True
    damping: float = 1e-4
    steps: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1 or self.steps < 1:
            raise PlanError(
                "the score takes a damping from 0 to 1 and at least 1 step", where="score obs"
            )

    def unjudged(self, program: BaseProgram, structures: Sequence[Structure]) -> dict[str, str]:
        """Structures that the score can't judge, to the reason."""
        return unread(program, structures, "obs")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`.

        Raises:
            PlanError: there is no calibration data, or no weight multiplies by the units.
        """
        from graphprune.passes.repair.refitting import Survey
        from graphprune.solvers.obs import Problem, Surgeon
        from graphprune.streaming import batches, find_biases, find_sites, stream
        from graphprune.streaming.consumers import consumers

        if inputs.calibration is None:
            raise PlanError("score obs needs calibration data", hint="pass calibration=")
        sites = find_sites(program, every=True)
        found = consumers(program, structures, sites)
        for structure in structures:
            if not found[structure.name]:
                raise PlanError(
                    "obs can't weigh units that no weight multiplies by",
                    where=structure.name,
                    hint="prune this role by another score",
                )
        names = dict.fromkeys(c.parameter for users in found.values() for c in users)
        sites = find_sites(program, include=list(names), every=True)
        scores: dict[str, FloatArray] = {}

        def decide(structure: Structure, problems: list[Problem]) -> None:
            outer = structure.within.size if structure.within is not None else 1
            order, costs = Surgeon(steps=self.steps).order(problems, outer * structure.size)
            energy = sum(p.energy for p in problems) or 1.0
            ranks = np.empty(len(order))
            ranks[order] = _rising(costs.numpy() / energy)
            shape = (1, outer, structure.size) if structure.within is not None else (1, -1)
            scores[structure.name] = ranks.reshape(shape)

        survey = Survey(
            program,
            consumers(program, structures, sites),
            find_biases(program, sites.all.values()),
            self.damping,
            decide,
        )
        stream(program, sites, batches(program, inputs.calibration), survey)
        return scores


def _rising(costs: FloatArray) -> FloatArray:
    """The largest so far, in strictly ascending order."""
    result = np.maximum.accumulate(costs)
    for i in range(1, len(result)):
        result[i] = max(result[i], np.nextafter(result[i - 1], np.inf))
    return result
