"""What a mask may be: a fraction of the weights, n kept of every m, or one that is given.

Masks are True where a weight is kept. A tie goes to the lower index (row-major), so that a mask
depends on nothing but the scores, and counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import CalibrationError, RecipeError
from graphprune.solvers.precision import finite, true_count

Group: TypeAlias = Literal["layer", "row"]
"""Weights that compete for the same places: all of a layer, or those of one output row."""


@dataclass(frozen=True)
class Unstructured:
    """Any weights may go.

    Attributes:
        sparsity: fraction removed, at least 0 and below 1; ``round(sparsity * count)`` weights go.
        preserve: weights that are zero stay zero and count as removed. Where they are more than
            asked for, all of them stay zero.

    Raises:
        RecipeError: the sparsity is out of range.
    """

    sparsity: float
    preserve: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise RecipeError(
                f"a sparsity of {self.sparsity} is not at least 0 and below 1",
                hint="sparsity is the fraction of the weights that goes",
            )

    def __str__(self) -> str:
        return f"{self.sparsity:.4g}"

    def count(self, total: int) -> int:
        """How many of `total` weights go."""
        return round(self.sparsity * total)

    def mask(self, scores: Tensor, weight: Tensor, *, group: Group = "layer") -> Tensor:
        """Keep what scores high.

        Args:
            scores: [out, in], finite.
            weight: [out, in]; its zeros are what `preserve` is about.
            group: weights that compete.

        Returns:
            [out, in], bool, True for kept.

        Raises:
            CalibrationError: a score is NaN or infinite.
        """
        fixed = (weight == 0) if self.preserve else None
        if group == "row":
            return ~lowest(scores, self.count(scores.shape[1]), fixed)
        flat = None if fixed is None else fixed.reshape(1, -1)
        gone = lowest(scores.reshape(1, -1), self.count(scores.numel()), flat)
        return ~gone.reshape(scores.shape)

    def shares(self, weight: Tensor, starts: range) -> list[int]:
        """Removed weights of each block of columns, so that blocks add up to the exact count.

        Args:
            weight: [out, in].
            starts: first columns of the blocks.
        """
        fixed = torch.zeros(weight.shape[1], dtype=torch.int64, device=weight.device)
        if self.preserve:
            fixed = (weight == 0).sum(0)
        zeros = [0, *fixed.cumsum(0).tolist()]
        wanted = max(self.count(weight.numel()) - zeros[-1], 0)
        free = weight.numel() - zeros[-1]
        ends = [min(start + starts.step, weight.shape[1]) for start in starts]
        open_ = [0, *(end * weight.shape[0] - zeros[end] for end in ends)]
        # Exact integers: a float product would misplace a weight in a layer of 2^53.
        reached = [(2 * wanted * o + free) // (2 * free) if free else 0 for o in open_]
        return [
            reached[i + 1] - reached[i] + zeros[end] - zeros[start]
            for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]


@dataclass(frozen=True)
class NM:
    """Of every m consecutive inputs of a row, n weights are kept (NVIDIA's reading: 2:4, 1:4).

    Columns after the last whole group stay dense; `tail` counts them.

    Attributes:
        n: kept weights of a group.
        m: size of a group.
        preserve: weights that are zero stay zero, also where a group has more than m - n of them.
        shorter: columns after the last whole group are a group too, of which the same share stays,
            rounded.

    Raises:
        RecipeError: n isn't between 1 and m - 1.
    """

    n: int
    m: int
    preserve: bool = False
    shorter: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RecipeError(
                f"{self.n}:{self.m} is no pattern",
                hint="n:m keeps n of every m weights, with n at least 1 and below m",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def tail(self, columns: int) -> int:
        """Columns after the last whole group that stay dense."""
        return 0 if self.shorter else columns % self.m

    def mask(self, scores: Tensor, weight: Tensor, *, group: Group = "layer") -> Tensor:
        """Keep the n best of each group; see `Unstructured.mask`. `group` changes nothing."""
        rows, columns = scores.shape
        whole = columns - columns % self.m
        grouped = scores[:, :whole].reshape(-1, self.m)
        fixed = (weight[:, :whole] == 0).reshape(-1, self.m) if self.preserve else None
        kept = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        if whole:
            kept[:, :whole] = ~lowest(grouped, self.m - self.n, fixed).reshape(rows, whole)
        if self.shorter and whole < columns:
            rest = columns - whole
            fixed = weight[:, whole:] == 0 if self.preserve else None
            gone = rest - (2 * self.n * rest + self.m) // (2 * self.m)
            kept[:, whole:] = ~lowest(scores[:, whole:].contiguous(), gone, fixed)
        elif self.preserve:
            kept[:, whole:] = weight[:, whole:] != 0
        return kept


STRIP, SLOTS = 256, 16
"""Columns of a strip of the format `strip_u8`, and what its number of values is a multiple of."""


def strips(sparsity: float) -> NM:
    """The pattern that `strip_u8` stores without padding: equal counts in 256 columns of a row.

    Args:
        sparsity: a multiple of 1/16 between 0 and 1.

    Raises:
        RecipeError: it isn't.
    """
    kept = (1 - sparsity) * STRIP / SLOTS
    if not 0 < sparsity < 1 or abs(kept - round(kept)) > 1e-9 * STRIP:
        below = min(max(int(sparsity * SLOTS), 1), SLOTS - 2)
        raise RecipeError(
            f"balanced strips can't have a sparsity of {sparsity:.6g}",
            why="of every 256 weights a multiple of 16 stays",
            hint=f"ask for {below / SLOTS:.2%} or {(below + 1) / SLOTS:.2%}",
        )
    return NM(round(kept) * SLOTS, STRIP, shorter=True)


@dataclass(frozen=True, eq=False)
class Given:
    """The mask is known; a solver only updates the weights that stay.

    Attributes:
        kept: [out, in], bool, True for kept.
    """

    kept: Tensor

    def __str__(self) -> str:
        return "a given mask"

    def mask(self, scores: Tensor, weight: Tensor, *, group: Group = "layer") -> Tensor:
        """The given mask, whatever the scores.

        Raises:
            RecipeError: it is not a bool mask of the weight's shape.
        """
        if self.kept.dtype != torch.bool or self.kept.shape != weight.shape:
            raise RecipeError(
                "a given mask must be bool and have the shape of the weight",
                why=f"{self.kept.dtype} {list(self.kept.shape)} for {list(weight.shape)}",
            )
        return self.kept.to(weight.device)


SCATTER = 2654435761
"""A large prime: its multiples sample a matrix evenly, where a stride may meet few columns."""

Pattern: TypeAlias = Unstructured | NM | Given


def lowest(scores: Tensor, count: int, fixed: Tensor | None = None) -> Tensor:
    """Mark the `count` lowest scores of every row; of equal ones, those of lower index.

    Args:
        scores: [rows, n], finite.
        count: how many, 0 to n.
        fixed: [rows, n], bool: these come first, and are marked even where they are more than
            `count`.

    Returns:
        [rows, n], bool.

    Raises:
        CalibrationError: a score is NaN or infinite.
    """
    if not finite(scores):
        bad = (~torch.isfinite(scores)).sum().item()
        raise CalibrationError(
            f"{bad} of {scores.numel()} scores are NaN or infinite",
            why="the weights are, or the product of a weight and an activation overflows",
        )
    if scores.shape[1] == 0 or count == 0:
        return torch.zeros_like(scores, dtype=torch.bool) if fixed is None else fixed
    if fixed is not None:
        scores = scores.masked_fill(fixed, -torch.inf)
    if count == scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    marked = _in_groups(scores, count) if scores.shape[1] <= 8 else _in_rows(scores, count)
    return marked if fixed is None else marked | fixed


def _in_groups(scores: Tensor, count: int) -> Tensor:
    """`lowest` for a few columns: every pair is compared, which is quicker than sorting."""
    columns = scores.T.contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.int8)
    for i in range(len(columns)):
        for j in range(i + 1, len(columns)):
            later_first = columns[j] < columns[i]
            ranks[i] += later_first
            ranks[j] += ~later_first
    return (ranks < count).T.contiguous()


def _in_rows(scores: Tensor, count: int) -> Tensor:
    """`lowest` for many columns: below the count-th value, and as many of its equals as fit."""
    threshold = _nth(scores, count)
    marked = scores <= threshold
    if true_count(marked) == count * len(marked):  # no row can have fewer
        return marked
    below, equal = scores < threshold, scores == threshold
    equal &= equal.cumsum(1) <= count - below.sum(1, keepdim=True)
    return below.logical_or_(equal)


def _nth(scores: Tensor, count: int) -> Tensor:
    """[rows, 1], the count-th lowest value of every row."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # NumPy selects with vector instructions, in a tenth of torch's time.
        ordered = np.partition(scores.detach().numpy(), count - 1, axis=1)
        return torch.from_numpy(ordered[:, count - 1 : count].copy())
    return scores.kthvalue(count, dim=1, keepdim=True).values
