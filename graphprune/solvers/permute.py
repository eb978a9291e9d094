"""Orders of input columns under which an n:m pattern loses less."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def deal(scores: Tensor, m: int) -> Tensor:
    """Deal columns to groups of m, from the least important on, back and forth.

    Args:
        scores: [out, in]; columns after the last whole group stay where they are.
        m: size of a group.

    Returns:
        [in], int64: the column that comes to each place.
    """
    columns = scores.shape[1]
    groups = columns // m
    order = torch.arange(columns, device=scores.device)
    ranked = scores[:, : groups * m].double().sum(0).argsort(stable=True).reshape(m, groups)
    ranked[1::2] = ranked[1::2].flip(1)
    order[: groups * m] = ranked.T.reshape(-1)
    return order


def exchange(scores: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """Exchange columns between groups, one place of every group at a time, as well as can be.

    With the other m - 1 columns of each group fixed, who takes which column is a linear
    assignment: a row of a group keeps its n - 1 best fixed scores, and the larger of the next one
    and the score that comes.

    Args:
        scores: [out, in].
        order: [in], to start from.
        n: kept of a group.
        m: size of a group.

    Returns:
        [in], int64, an order that keeps at least as much score.
    """
    groups = scores.shape[1] // m
    if groups < 2:
        return order
    places = order[: groups * m].reshape(groups, m).clone()
    for place in range(m):
        rest = [p for p in range(m) if p != place]
        fixed = scores[:, places[:, rest].reshape(-1)].reshape(len(scores), groups, m - 1)
        nth = fixed.topk(n, dim=2).values[:, :, -1]  # [out, groups]
        coming = scores[:, places[:, place]]
        gain = torch.stack(
            [torch.maximum(nth[:, [g]], coming).sum(0, dtype=torch.float64) for g in range(groups)]
        )
        # What a group keeps apart from the exchanged place is the same for every column.
        taken = assign(-gain.cpu().numpy()).to(places.device)
        places[:, place] = places[taken, place]
    result = order.clone()
    result[: groups * m] = places.reshape(-1)
    return result


def assign(cost: npt.NDArray[np.float64]) -> Tensor:
    """The column of each row in a cheapest perfect matching, by shortest augmenting paths.

    Kuhn's Hungarian method in the form with potentials, O(n³), its inner loop over arrays.
    """
    size = len(cost)
    u, v = np.zeros(size), np.zeros(size + 1)
    owner = np.full(size + 1, -1)  # row of each column; the last column is where a path starts
    for row in range(size):
        owner[size] = row
        column = size
        least = np.full(size, np.inf)
        previous = np.full(size, size)
        done = np.zeros(size + 1, dtype=bool)
        while owner[column] >= 0:
            done[column] = True
            current = owner[column]
            reduced = cost[current] - u[current] - v[:size]
            better = ~done[:size] & (reduced < least)
            least[better] = reduced[better]
            previous[better] = column
            open_ = np.where(done[:size], np.inf, least)
            following = int(open_.argmin())
            step = open_[following]
            u[owner[done]] += step
            v[done] -= step
            least[~done[:size]] -= step
            column = following
        while column != size:
            owner[column] = owner[previous[column]]
            column = int(previous[column])
    taken = np.empty(size, dtype=np.int64)
    taken[owner[:size]] = np.arange(size)
    return torch.from_numpy(taken)
