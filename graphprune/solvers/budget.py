"""Layer budgets: how much sparsity each layer of a model gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphprune.errors import CalibrationError, RecipeError

FLOOR = 0.01  # density below which no layer is driven to even out others


def uniform(sizes: Sequence[int], sparsity: float) -> list[float]:
    """The same sparsity for every layer.

    Args:
        sizes: weights of each layer.
        sparsity: fraction removed, at least 0 and below 1.
    """
    _check(sizes, sparsity)
    return [sparsity] * len(sizes)


def owl(
    outliers: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = 0.08
) -> list[float]:
    """More density for layers with more outliers.

    Densities are ``1 - sparsity`` plus the outlier ratios scaled to a range of ``2 * spread``.
    They are shifted so that their mean, weighted by `sizes`, is ``1 - sparsity`` also after each
    was cut to a density of at most 1 and at least `FLOOR` (or ``1 - sparsity``, if that is less).
    Yin et al., Outlier Weighed Layerwise Sparsity (OWL), 2023 (arXiv:2310.05175).

    Args:
        outliers: ratio of each layer, see `outlier_ratio`; all equal gives the uniform budget.
        sizes: weights of each layer.
        sparsity: mean over all weights, at least 0 and below 1.
        spread: lambda; how far a layer may be from the mean, at least 0.

    Returns:
        The sparsity of each layer, at least 0 and below 1.

    Raises:
        RecipeError: an argument is out of range.
    """
    _check(sizes, sparsity)
    ratios = np.asarray(outliers, dtype=np.float64)
    if ratios.shape != (len(sizes),) or not np.isfinite(ratios).all() or (ratios < 0).any():
        raise RecipeError("OWL takes a finite outlier ratio of each layer, at least 0")
    if not 0 <= spread < 1:
        raise RecipeError(f"a spread of {spread} is not at least 0 and below 1", where="OWL")
    span = float(np.ptp(ratios))
    if span == 0 or spread == 0:
        return uniform(sizes, sparsity)
    wanted = 1 - sparsity
    shape = (ratios - ratios.min()) / span * 2 * spread
    density = _shifted(shape, np.asarray(sizes, np.float64), wanted, min(FLOOR, wanted), 1.0)
    return [float(s) for s in np.clip(1 - density, 0, None)]


def outlier_ratio(scores: Iterable[Tensor], threshold: float = 5.0) -> float:
    """Fraction of a layer's scores above `threshold` times their mean.

    Args:
        scores: of each matrix of the layer, Wanda's in the paper. They are gone through twice; an
            iterable that makes them anew needs memory for one.
        threshold: M.
    """
    each = list(scores) if iter(scores) is scores else scores
    total, mean = 0, 0.0
    for s in each:
        total += s.numel()
        mean += float(s.sum(dtype=torch.float64))
    if not total:
        return 0.0
    mean /= total
    return sum(int((s > threshold * mean).sum()) for s in each) / total


def least_error(
    levels: Sequence[float],
    errors: Sequence[Sequence[float]],
    sizes: Sequence[int],
    sparsity: float,
) -> list[float]:
    """The budget whose errors have the least sum.

    Errors between two levels are taken to be linear, and each layer's to be convex: where they
    aren't, by their lower convex hull. So the best budget takes the pieces of all layers by their
    rise per weight, the flattest first; of equals, the earlier layer's. One piece is taken in part,
    so that the mean is exact.

    Args:
        levels: sparsities, ascending, at least 0 and below 1; no layer is taken beyond them.
        errors: of each layer, one per level.
        sizes: weights of each layer.
        sparsity: mean over all weights, within the levels.

    Returns:
        The sparsity of each layer.

    Raises:
        RecipeError: an argument is out of range.
    """
    _check(sizes, sparsity)
    at = np.asarray(levels, dtype=np.float64)
    table = np.asarray(errors, dtype=np.float64).reshape(len(errors), -1)
    if table.shape != (len(sizes), len(at)) or not np.isfinite(table).all():
        raise RecipeError("a budget takes a finite error of each layer at each level")
    if not at.size or (np.diff(at) <= 0).any() or at[0] < 0 or at[-1] >= 1:
        raise RecipeError("levels of sparsity ascend from at least 0 to below 1")
    if not at[0] <= sparsity <= at[-1]:
        raise RecipeError(f"a sparsity of {sparsity} is not from {at[0]} to {at[-1]}")
    pieces = [
        (slope / size, unit, width)
        for unit, (row, size) in enumerate(zip(table, sizes, strict=True))
        for slope, width in _hull(at, row)
    ]
    pieces.sort(key=lambda piece: piece[:2])
    found = [float(at[0])] * len(sizes)
    left = (sparsity - float(at[0])) * sum(sizes)
    for _, unit, width in pieces:
        taken = min(left, width * sizes[unit])
        found[unit] += taken / sizes[unit]
        left -= taken
    return [min(s, float(at[-1])) for s in found]


def _hull(
    at: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> list[tuple[float, float]]:
    """(slope, width) of the pieces of the lower convex hull, from left to right."""
    corners = [0]
    for i in range(1, len(at)):
        while len(corners) > 1:
            a, b = corners[-2:]
            # b is above the line from a to i, or on it
            over = (values[b] - values[a]) * (at[i] - at[a]) >= (values[i] - values[a]) * (
                at[b] - at[a]
            )
            if not over:
                break
            corners.pop()
        corners.append(i)
    return [
        (float((values[b] - values[a]) / (at[b] - at[a])), float(at[b] - at[a]))
        for a, b in pairwise(corners)
    ]


def below_threshold(read: Callable[[], Iterable[Tensor]], sparsity: float) -> list[int]:
    """How many weights of each tensor are among the smallest of all of them together.

    The threshold is found digit by digit of its binary form, so that no more than one tensor is in
    memory. Equals of the threshold go by the order of the tensors; the sum is exactly
    ``round(sparsity * count)``.

    Args:
        read: gives the tensors anew; they are read some times.
        sparsity: fraction removed, at least 0 and below 1.

    Raises:
        CalibrationError: a weight is NaN or infinite.
    """
    sizes, wide = [], torch.float32
    for tensor in read():
        sizes.append(tensor.numel())
        wide = torch.promote_types(wide, tensor.dtype)
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CalibrationError(f"{bad} of {tensor.numel()} weights are NaN or infinite")
    _check(sizes, sparsity)
    wanted = left = round(sparsity * sum(sizes))
    if wanted == 0:
        return [0] * len(sizes)
    prefix = 0
    # The bits of a number that isn't negative, read as an integer, are in its order.
    for shift in range(torch.finfo(wide).bits - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for bits in map(lambda t: _bits(t, wide), read()):
            digits = (bits >> shift)[(bits >> shift >> _DIGIT) == prefix] & (2**_DIGIT - 1)
            counts += torch.bincount(digits, minlength=2**_DIGIT)
        reached = counts.cumsum(0)
        digit = int(torch.searchsorted(reached, left))
        left -= int(reached[digit] - counts[digit])
        prefix = prefix << _DIGIT | digit
    found = []
    for bits in map(lambda t: _bits(t, wide), read()):
        equal = min(int((bits == prefix).sum()), left)
        left -= equal
        found.append(int((bits < prefix).sum()) + equal)
    return found


def in_whole(shares: Sequence[float], sizes: Sequence[int], grains: Sequence[int]) -> list[float]:
    """A budget whose every layer loses a whole number of weights, or of columns.

    What rounding adds to a layer or takes from it, the next one makes up for, as far as it has
    room: then the sum of all is right to half a grain of the last.

    Args:
        shares: the sparsity of each layer, from 0 to 1.
        sizes: weights of each layer.
        grains: weights that only go together; as many as a layer has rows where each of them
            loses the same number. They divide the sizes.
    """
    found, owed = [], 0.0
    for share, size, grain in zip(shares, sizes, grains, strict=True):
        wanted = share * size + owed
        most = size // grain if share >= 1 else size // grain - 1  # rounding empties no layer
        count = max(min(round(wanted / grain), most), 0) * grain
        owed = wanted - count
        found.append(count / size)
    return found


_DIGIT = 16  # bits of the threshold that are found at once


def _bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[n], int64: the bits of the absolute values."""
    flat = tensor.detach().to(dtype).abs().flatten().contiguous().cpu()
    return flat.view(torch.int32 if dtype == torch.float32 else torch.int64).long()


def _shifted(
    shape: npt.NDArray[np.float64],
    sizes: npt.NDArray[np.float64],
    mean: float,
    low: float,
    high: float,
) -> npt.NDArray[np.float64]:
    """`shape` plus a constant, cut to [low, high], of the given weighted mean.

    The weighted mean rises with the constant, linearly between the points where an entry meets a
    bound; so the piece is looked up and solved.
    """
    weights = sizes / sizes.sum()

    def reached(constant: float) -> float:
        return float(weights @ np.clip(shape + constant, low, high))

    knots = np.sort(np.concatenate([low - shape, high - shape]))
    at = np.array([reached(c) for c in knots])
    right = int(np.searchsorted(at, mean))
    right = min(max(right, 1), len(knots) - 1)
    a, b = knots[right - 1], knots[right]
    rise = at[right] - at[right - 1]
    constant = a + (b - a) * (mean - at[right - 1]) / rise if rise > 0 else a
    cut: npt.NDArray[np.float64] = np.clip(shape + constant, low, high)
    return cut


def _check(sizes: Sequence[int], sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise RecipeError(f"a sparsity of {sparsity} is not at least 0 and below 1")
    if not sizes or any(size <= 0 for size in sizes):
        raise RecipeError("a budget needs layers, each with a weight")
