"""Block influence: how far a layer turns the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.passes.shared.forward import samples_of, traced_program
from graphprune.passes.shared.score import Inputs
from graphprune.passes.shared.similarity import feature_dims, mean_over_tokens, only_blocks
from graphprune.plan.units import FloatArray


@dataclass(frozen=True)
class BlockInfluence:
    """``1 - mean over tokens of cos(x_in, x_out)`` for each layer, or branch of one.

    x_in and x_out are what the residual stream holds of a token before and after the layer. Men et
    al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024
    (arXiv:2403.03853). All layers are measured in one pass over the calibration data; cosines are
    computed in float64 from activations in float32.

    Attributes:
        batch: calibration samples per forward pass, where calibration is a tensor or a mapping.
    """

    needs_data: ClassVar[bool] = True
    batch: int = 4

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise PlanError("a batch has at least one window", where="score block-influence")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every layer; see `graphprune.passes.shared.score.Score`.

        Layers that can't be removed have score 0, which nobody reads.

        Raises:
            PlanError: a structure is no stack of layers, the model is no PyTorch graph, there is
                no calibration data, or the residual stream isn't finite.
        """
        stacks = only_blocks(structures, "block-influence")
        traced = traced_program(program, "block-influence")
        samples = samples_of(traced, inputs.calibration, "block-influence", self.batch)
        pairs = [(b.entry, b.exit) for s in stacks for b in s.blocks]
        found = mean_over_tokens(
            traced, pairs, feature_dims(traced, stacks), samples, lambda cosine: 1 - cosine
        )
        scores = {s.name: np.zeros((1, s.size)) for s in stacks}
        for s in stacks:
            for b in s.blocks:
                scores[s.name][0, b.index] = found[b.entry, b.exit]
        return scores
