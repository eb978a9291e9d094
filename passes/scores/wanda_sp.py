"""Wanda-sp: Wanda's scores, added up over what a unit owns in its consumers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.passes.shared.activations import column_sums, read
from graphprune.passes.shared.judging import unread
from graphprune.passes.shared.score import Inputs
from graphprune.plan.units import FloatArray
from graphprune.solvers import Norms


@dataclass(frozen=True)
class WandaSP:
    """Sum over a unit's columns j of ``mean over i of |W_ij|``, times the norm of what they read.

    The norm is the root mean square of input j over all tokens. An et al., Fluctuation-based
    Adaptive Structured Pruning for Large Language Models, 2024 (arXiv:2312.11983), who compare with
    it; Sun et al., 2023 (arXiv:2306.11695) for single weights. One row per consumer.
    """

    needs_data: ClassVar[bool] = True

    def unjudged(self, program: BaseProgram, structures: Sequence[Structure]) -> dict[str, str]:
        """Structures that the score can't judge, to the reason."""
        return unread(program, structures, "wanda-sp")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`."""
        found = read(program, structures, inputs, "wanda-sp", Norms, lambda n: n.norms, _weighed)
        return {
            name: np.stack([one.per_unit() for one in readings]) for name, readings in found.items()
        }


def _weighed(matrix: Tensor, norms: FloatArray) -> FloatArray:
    return column_sums(matrix, torch.abs) / len(matrix) * norms
