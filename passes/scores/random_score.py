"""Random: the baseline that every other score has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.passes.shared.score import Inputs
from graphprune.plan.units import FloatArray


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1), from the seed and the structure's name: no order or platform matters.

    Attributes:
        seed: None takes the seed of the selection.
    """

    seed: int | None = None

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`."""
        seed = inputs.seed if self.seed is None else self.seed
        result = {}
        for structure in structures:
            outer = (structure.within.size,) if structure.within else ()
            rng = np.random.default_rng([seed, zlib.crc32(structure.name.encode())])
            result[structure.name] = rng.random((1, *outer, structure.size))
        return result
