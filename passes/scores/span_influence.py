"""Span influence: how far a run of layers turns the residual stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Block, Structure
from graphprune.axes.expr import IntArray
from graphprune.errors import PlanError
from graphprune.passes.shared.choice import Choice
from graphprune.passes.shared.forward import samples_of, traced_program
from graphprune.passes.shared.score import Inputs
from graphprune.passes.shared.similarity import Pair, feature_dims, mean_over_tokens, only_blocks
from graphprune.plan.kept import Units
from graphprune.plan.units import FloatArray

NAME = "span-influence"


@dataclass(frozen=True)
class SpanInfluence:
    """The run of n layers in a row that turns the residual stream least goes.

    It is the one with the smallest mean angular distance ``arccos(cos(x_in, x_out)) / pi`` between
    what the stream holds of a token before its first and after its last layer. Gromov et al., The
    Unreasonable Ineffectiveness of the Deeper Layers, 2024 (arXiv:2403.17887), who look at the last
    token of each sample only; here all tokens count, which takes fewer samples. The runs of all
    lengths are measured in one pass.

    Attributes:
        batch: calibration samples per forward pass, where calibration is a tensor or a mapping.
    """

    needs_data: ClassVar[bool] = True
    batch: int = 4

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise PlanError("a batch has at least one window", where=f"score {NAME}")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """The angular distance over every single layer; see `graphprune.passes.shared.score.Score`.

        Raises:
            PlanError: see `choose`.
        """
        scores = {}
        for s in structures:
            found = self.choose(program, s, np.array([b.index for b in s.blocks]), inputs)
            scores[s.name] = np.zeros((1, s.size))
            for b in s.blocks:
                scores[s.name][0, b.index] = found.distances[b.entry, b.exit]
        return scores

    def choose(
        self, program: BaseProgram, structure: Structure, removable: IntArray, inputs: Inputs
    ) -> _Spans:
        """The spans of a stack; see `graphprune.passes.shared.choice.Chooser`.

        Raises:
            PlanError: the structure is no stack of layers, the model is no PyTorch graph, there is
                no calibration data, or the residual stream isn't finite.
        """
        (stack,) = only_blocks([structure], NAME)
        traced = traced_program(program, NAME)
        samples = samples_of(traced, inputs.calibration, NAME, self.batch)
        runs = _runs(stack, removable)
        pairs = [
            (run[i].entry, run[j].exit) for run in runs for i in range(len(run))
            for j in range(i, len(run))
        ]  # fmt: skip
        distances = mean_over_tokens(
            traced, pairs, feature_dims(traced, [stack]), samples, _angular_distance
        )
        return _Spans(stack, tuple(map(tuple, runs)), distances)


@dataclass(frozen=True)
class _Spans(Choice):
    """The spans of a stack.

    Attributes:
        structure: the stack.
        runs: layers that follow one another and may all go, longest possible.
        distances: (entry, exit) of every span to the distance between them.
    """

    structure: Structure
    runs: tuple[tuple[Block, ...], ...]
    distances: Mapping[Pair, float]

    def kept(self, count: int) -> Units:
        """All layers but the span; of equal spans the last one goes."""
        n = self.structure.size - count
        if not n:
            return tuple(range(self.structure.size))
        spans = [run[i : i + n] for run in self.runs for i in range(len(run) - n + 1)]
        if not spans:
            longest = max(map(len, self.runs), default=0)
            raise PlanError(
                f"no {n} layers in a row can be removed",
                where=f"structure {self.structure.name}, score {NAME}",
                why=f"the longest run of layers that may go has {longest}",
                hint="remove fewer layers, exclude fewer, or take score block-influence",
            )
        best = min(reversed(spans), key=lambda span: self.distances[span[0].entry, span[-1].exit])
        gone = {b.index for b in best}
        return tuple(i for i in range(self.structure.size) if i not in gone)


def _runs(stack: Structure, removable: IntArray) -> list[list[Block]]:
    """The removable layers of a stack, cut where one doesn't begin where the last one ended."""
    chosen = set(removable.tolist())
    blocks = sorted((b for b in stack.blocks if b.index in chosen), key=lambda b: b.index)
    runs = [blocks[:1]] if blocks else []
    for before, block in pairwise(blocks):
        if block.index == before.index + 1 and block.entry == before.exit:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _angular_distance(cosine: Tensor) -> Tensor:
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi
