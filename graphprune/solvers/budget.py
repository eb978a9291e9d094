"""Layer budgets: how much sparsity each layer of a model gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from graphprune.errors import RecipeError

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
        scores: of each matrix of the layer, Wanda's in the paper.
        threshold: M.
    """
    each = list(scores)
    total = sum(s.numel() for s in each)
    if not total:
        return 0.0
    mean = sum(float(s.double().sum()) for s in each) / total
    return sum(int((s > threshold * mean).sum()) for s in each) / total


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
