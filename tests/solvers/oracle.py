"""Layers to prune, and optimal brain surgery done the slow way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from graphprune.solvers import Moments, Solved


def inputs(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """[tokens, features], float64: correlated, of unequal size and with a mean."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=g, dtype=torch.float64) / features**0.5
    x = torch.randn(tokens, features, generator=g, dtype=torch.float64) @ mix
    x = x + 0.3 * torch.randn(features, generator=g, dtype=torch.float64)
    return x * torch.randn(features, generator=g, dtype=torch.float64).exp()


def layer(
    out: int, features: int, tokens: int = 400, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, Moments, torch.Tensor]:
    """A weight, the statistic of its inputs, and the inputs."""
    x = inputs(tokens, features, seed)
    g = torch.Generator().manual_seed(seed + 1000)
    weight = torch.randn(out, features, generator=g, dtype=torch.float64)
    return weight.to(dtype), moment(x.to(dtype)), x


def moment(x: torch.Tensor) -> Moments:
    """The moments of x, in its type."""
    statistic = Moments(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    statistic.add(x, "test")
    return statistic


def lost(solved: Solved) -> float:
    """The error that was reported."""
    assert solved.error is not None
    return solved.error


def error_on(x: torch.Tensor, dense: torch.Tensor, pruned: torch.Tensor) -> float:
    """Relative squared error of the outputs, from the inputs themselves."""
    wide, d, p = (np.asarray(t.detach().double()) for t in (x, dense, pruned))
    return float(((wide @ (d - p).T) ** 2).sum() / ((wide @ d.T) ** 2).sum())


def damped(x: torch.Tensor, damping: float = 0.01) -> np.ndarray:
    """X'X / tokens with damping; every feature is live."""
    h = np.asarray(x.double().T @ x.double()) / len(x)
    return h + damping * np.diag(h).mean() * np.eye(len(h))


def surgery(
    weight: torch.Tensor,
    hessian: np.ndarray,
    mask: np.ndarray | None = None,
    step: int = 0,
    choose: Callable[[int, np.ndarray], np.ndarray] | None = None,
    rounding: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """OBS in float64; the inverse of what is left of the Hessian is taken anew for every column.

    Args:
        weight: [out, in].
        hessian: [in, in], damped.
        mask: [out, in], True for kept; or it is chosen.
        step: columns whose mask is chosen together.
        choose: first column and scores [out, step] to mask [out, step].
        rounding: of a column.

    Returns:
        The weight and the mask.
    """
    w = np.array(weight, dtype=np.float64)
    count = w.shape[1]
    kept = np.ones(w.shape, dtype=bool) if mask is None else mask
    for j in range(count):
        if choose and j % step == 0:
            block = range(j, min(j + step, count))
            own = np.array([np.linalg.inv(hessian[i:, i:])[0, 0] for i in block])
            kept[:, block] = choose(j, w[:, block] ** 2 / own)
        inverse = np.linalg.inv(hessian[j:, j:])
        value = w[:, j] if rounding is None else rounding(w[:, j])
        settled = np.where(kept[:, j], value, 0.0)
        w[:, j:] -= np.outer((w[:, j] - settled) / inverse[0, 0], inverse[0])
        w[:, j] = settled
    return w, kept


def smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """Bool: the `count` smallest of a flat array; of equals, the first."""
    marked = np.zeros(scores.size, dtype=bool)
    marked[np.argsort(scores, axis=None, kind="stable")[:count]] = True
    return marked.reshape(scores.shape)


def rows_smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """`smallest` of each row."""
    return np.stack([smallest(row, count) for row in scores])
