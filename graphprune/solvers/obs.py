"""Structured optimal brain surgeon: which whole units a layer can do without, and at what cost.

Let W read x with H = E[x xᵀ]. If the columns outside K go and the others are refitted, the squared
error of the output is ``E(K) = tr(W H Wᵀ) - tr(B_K (H_KK)⁻¹ B_Kᵀ)`` with B = W H (Hassibi and
Stork, 1992). Units are sets of columns. The least costly go one after another, with updates in
between, as in ZipLM (Kurtic et al., 2023, arXiv:2302.04089); then a local search exchanges units
while the exact error falls, as in OSSCAR (Meng et al., 2024, arXiv:2403.12983).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graphprune.axes.expr import IntArray
from graphprune.errors import CalibrationError

EXHAUSTIVE = 64  # so many choices are all tried
FIXED = -1


@dataclass(eq=False)
class Problem:
    """One layer that reads units.

    Attributes:
        weight: [out, in], float64: what the layer would be if nothing went.
        hessian: [in, in], float64, damped.
        units: [in]: the unit that owns each column; -1 for those that stay whatever goes.
        targets: [out, in], B.
        energy: the error if every column went.
    """

    weight: Tensor
    hessian: Tensor
    units: IntArray
    targets: Tensor = field(init=False)
    energy: float = field(init=False)
    _columns: dict[int, IntArray] = field(init=False)

    def __post_init__(self) -> None:
        self.targets = self.weight @ self.hessian  # B
        self.energy = float((self.targets * self.weight).sum())
        order = np.argsort(self.units, kind="stable")
        found, starts = np.unique(self.units[order], return_index=True)
        parts = np.split(order, starts[1:])
        self._columns = dict(zip(found.tolist(), parts, strict=True))

    def columns(self, units: Sequence[int]) -> IntArray:
        """The columns of some units, unit by unit."""
        own = self._columns
        parts = [own[u] for u in units if u in own]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def widths(self, units: IntArray) -> IntArray:
        """[k]: the number of columns of each of some units."""
        counted = np.bincount(self.units[self.units != FIXED], minlength=int(units.max()) + 1)
        return np.asarray(counted[units], dtype=np.int64)

    def left(self, units: Sequence[int]) -> IntArray:
        """The columns that stay if `units` do."""
        return np.sort(np.concatenate([self.columns([FIXED]), self.columns(units)]))

    def loss(self, units: Sequence[int]) -> float:
        """E(K) for the kept units."""
        return Fit(self, units).loss


@dataclass(frozen=True)
class Surgeon:
    """Chooses units.

    Attributes:
        steps: the greedy descent removes in about so many steps; units of one step don't see each
            other. It makes no difference to a layer with fewer units to remove.
        rounds: exchanges that the local search tries; 0 leaves it out. They hardly change a
            layer with hundreds of units, where the descent is as good as it gets.
    """

    steps: int = 128
    rounds: int = 10

    def choose(self, problems: Sequence[Problem], size: int, keep: int, outer: int = 1) -> IntArray:
        """The units that stay.

        Args:
            problems: all layers that read the units; their errors are added.
            size: number of units of each outer unit.
            keep: how many of them stay.
            outer: number of outer units, each of which keeps its own; unit u of outer unit o has
                the number ``o * size + u``.

        Returns:
            [outer, keep], ascending in each row.

        Raises:
            CalibrationError: there are fewer units than are to stay.
        """
        if not 0 < keep <= size:
            raise CalibrationError(f"{keep} of {size} units can't stay")
        if keep == size:
            return np.tile(np.arange(size, dtype=np.int64), (outer, 1))
        if outer == 1 and math.comb(size, keep) <= EXHAUSTIVE:
            return _best(problems, itertools.combinations(range(size), keep))
        kept = next(_descend(problems, size, [keep], outer, self.steps))
        return self._improved(problems, kept, size)

    def choose_each(
        self, problems: Sequence[Problem], size: int, keeps: Iterable[int], outer: int = 1
    ) -> dict[int, IntArray]:
        """The units that stay for each of several numbers of them, all from one greedy descent.

        Args:
            problems: see `choose`.
            size: see `choose`.
            keeps: how many stay.
            outer: see `choose`.

        Returns:
            Each number to what `choose` says of it, but for the units that one step of the descent
            takes together: steps are those of the smallest number.

        Raises:
            CalibrationError: see `choose`.
        """
        found: dict[int, IntArray] = {}
        descending: list[int] = []
        for keep in sorted(set(keeps), reverse=True):
            few = outer == 1 and math.comb(size, keep) <= EXHAUSTIVE
            if few or not 0 < keep < size:
                found[keep] = self.choose(problems, size, keep, outer)
            else:
                descending.append(keep)
        if descending:
            descent = _descend(problems, size, descending, outer, self.steps)
            for keep, kept in zip(descending, descent, strict=True):
                found[keep] = self._improved(problems, kept, size)
        return found

    def order(self, problems: Sequence[Problem], size: int) -> tuple[IntArray, Tensor]:
        """All units in the order in which the greedy descent removes them, and what each costs.

        Returns:
            ([size] units, [size] the rise of the error with each, never negative).
        """
        state = Descent(problems)
        left = np.arange(size)
        order: list[int] = []
        costs: list[float] = []
        step = max(1, -(-size // self.steps))
        while len(left):
            scores = state.scores(left)
            gone = np.argsort(scores, kind="stable")[:step]
            order += left[gone].tolist()
            costs += np.maximum(scores[gone], 0).tolist()
            state.remove(left[gone].tolist())
            left = np.delete(left, gone)
        return np.array(order, dtype=np.int64), torch.tensor(costs, dtype=torch.float64)

    def _improved(self, problems: Sequence[Problem], kept: IntArray, size: int) -> IntArray:
        """Exchange units as long as the error falls: drop some more, then take the best back."""
        keep = kept.shape[1]
        number = max(1, min(keep - 1, size - keep) // 16)
        fits = [Fit(p, kept.ravel().tolist()) for p in problems]
        skip = 0
        for _ in range(self.rounds if keep > 1 else 0):
            if number > 1:
                trial = _exchanged(problems, fits, kept, size, number)
            else:
                trial = _exchanged_one(problems, fits, kept, size, skip)
            found = [Fit(p, trial.ravel().tolist()) for p in problems]
            if sum(f.loss for f in found) < sum(f.loss for f in fits) * (1 - 1e-9):
                kept, fits, skip = trial, found, 0
            elif number > 1:
                number //= 2
            elif skip + 1 < kept.size:  # the cheapest came back: try the next
                skip += 1
            else:
                break
        return kept


class Descent:
    """Weights and inverse Hessians of all layers in the course of the descent."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = problems
        self.weights = [p.weight.clone() for p in problems]
        self.inverses = [_inverse(p.hessian) for p in problems]

    def scores(self, units: IntArray) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """[units]: by how much the error rises if one of them goes."""
        total = np.zeros(len(units))
        for problem, weight, inverse in zip(
            self.problems, self.weights, self.inverses, strict=True
        ):
            total += _unit_costs(problem, weight, inverse, units)
        return total

    def remove(self, units: Sequence[int]) -> None:
        """Let units go, and have the others make up for them."""
        for problem, weight, inverse in zip(
            self.problems, self.weights, self.inverses, strict=True
        ):
            gone = _index(problem.columns(units), inverse)
            if not len(gone):
                continue
            rows = inverse[gone]  # [g, in]
            factor = _solved(rows[:, gone], rows)  # G_gg⁻¹ G_g
            weight.addmm_(weight[:, gone], factor, alpha=-1)
            inverse.addmm_(rows.T, factor, alpha=-1)
            weight[:, gone] = 0
            inverse[gone] = 0
            inverse[:, gone] = 0
            inverse[gone, gone] = 1


class Fit:
    """The best weights for given units, and what follows from them."""

    def __init__(self, problem: Problem, units: Sequence[int]) -> None:
        self.problem = problem
        self.kept = _index(problem.left(units), problem.hessian)
        hessian = problem.hessian
        self.factor = _lower(hessian[self.kept][:, self.kept])
        wanted = problem.targets[:, self.kept].T
        self.right = torch.linalg.solve_triangular(self.factor, wanted, upper=False)  # L⁻¹ B_Kᵀ
        self.loss = max(problem.energy - float(self.right.square().sum()), 0.0)

    def costs(self, units: IntArray) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """By how much the error rises if one of the kept units goes."""
        inverse = torch.cholesky_inverse(self.factor)
        weight = torch.linalg.solve_triangular(self.factor.T, self.right, upper=True).T
        places = {c: i for i, c in enumerate(self.kept.tolist())}
        return _unit_costs(self.problem, weight, inverse, units, places)

    def gains(self, units: IntArray) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """By how much the error falls if one of the removed units comes back."""
        gone = _index(self.problem.columns(units.tolist()), self.problem.hessian)
        if not len(gone):
            return np.zeros(len(units))
        cross = self.problem.hessian[self.kept][:, gone]
        half = torch.linalg.solve_triangular(self.factor, cross, upper=False)
        rest = self.problem.hessian[gone][:, gone] - half.T @ half
        missing = self.problem.targets[:, gone] - self.right.T @ half
        return _block_quadratics(self.problem, missing, rest, units)


def _index(columns: IntArray, like: Tensor) -> Tensor:
    """Columns as an index, where `like` is."""
    return torch.from_numpy(columns).to(like.device)


def _lower(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of matrices that are positive definite but for rounding."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None].clamp_min(1e-300)
    for more in (1e-12, 1e-10, 1e-8, 1e-6, 1e-4):
        if not bool(info.any()):
            return factor
        factor, info = torch.linalg.cholesky_ex(
            matrix + torch.diag_embed((more * scale).expand(matrix.shape[:-1]))
        )
    if bool(info.any()):
        raise CalibrationError(
            "the Hessian has no Cholesky factor", hint="calibrate with more tokens or more damping"
        )
    return factor


def _inverse(hessian: Tensor) -> Tensor:
    inverse: Tensor = torch.cholesky_inverse(_lower(hessian))
    return inverse


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.cholesky_solve(right, _lower(matrix))
    return solution


def _unit_costs(
    problem: Problem,
    weight: Tensor,
    inverse: Tensor,
    units: IntArray,
    places: dict[int, int] | None = None,
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """tr(W_u (G_uu)⁻¹ W_uᵀ) for each unit."""
    columns = problem.columns(units.tolist())
    if places is not None:
        columns = np.array([places[int(c)] for c in columns], dtype=np.int64)
    chosen = _index(columns, inverse)
    return _block_quadratics(problem, weight[:, chosen], inverse, units, chosen)


def _block_quadratics(
    problem: Problem, rows: Tensor, matrix: Tensor, units: IntArray, chosen: Tensor | None = None
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """tr(R_u (M_uu)⁻¹ R_uᵀ) for each unit, whose columns follow each other in `rows`.

    Args:
        problem: knows the columns of each unit.
        rows: [out, columns].
        matrix: [n, n].
        units: [k].
        chosen: the row of `matrix` of each column; None where they are in the same order.
    """
    widths = problem.widths(units)
    result = np.zeros(len(units))
    if not widths.any():
        return result
    place = torch.arange(rows.shape[1], device=rows.device) if chosen is None else chosen
    if widths.max() == 1:
        quotients = rows.square().sum(0) / matrix[place, place].clamp_min(1e-300)
        result[widths == 1] = quotients.cpu().numpy()
        return result
    if (widths == widths[0]).all():
        places = place.view(len(units), -1)
        blocks = matrix[places[:, :, None], places[:, None, :]]  # [units, width, width]
        right = rows.T.reshape(len(units), int(widths[0]), -1)
        half = torch.linalg.solve_triangular(_lower(blocks), right, upper=False)
        return np.asarray(half.square().sum((1, 2)).cpu().numpy())
    starts = np.concatenate([[0], np.cumsum(widths)])
    for i, width in enumerate(widths.tolist()):
        if width:
            own = slice(int(starts[i]), int(starts[i]) + width)
            block = matrix[place[own]][:, place[own]]
            right = rows[:, own].T
            half = torch.linalg.solve_triangular(_lower(block), right, upper=False)
            result[i] = float(half.square().sum())
    return result


def _best(problems: Sequence[Problem], choices: Iterator[tuple[int, ...]]) -> IntArray:
    best = min(choices, key=lambda units: sum(p.loss(units) for p in problems))
    return np.array([best], dtype=np.int64)


def _descend(
    problems: Sequence[Problem], size: int, keeps: Sequence[int], outer: int, steps: int
) -> Iterator[IntArray]:
    """The units that the greedy descent leaves, [outer, keep], for each of some falling numbers."""
    state = Descent(problems)
    left = np.ones((outer, size), dtype=bool)
    step = max(1, -(-outer * (size - keeps[-1]) // steps))
    for keep in keeps:
        while left.sum() > outer * keep:
            units = np.flatnonzero(left & (left.sum(1) > keep)[:, None])
            scores = state.scores(units)
            spare = left.sum(1) - keep
            gone: list[int] = []
            for unit in units[np.argsort(scores, kind="stable")].tolist():
                if spare[unit // size] > 0:
                    spare[unit // size] -= 1
                    gone.append(unit)
                    if len(gone) == step:
                        break
            left.ravel()[gone] = False
            state.remove(gone)
        yield np.stack([o * size + np.flatnonzero(row) for o, row in enumerate(left)])


def _exchanged(
    problems: Sequence[Problem], fits: Sequence[Fit], kept: IntArray, size: int, number: int
) -> IntArray:
    """`kept` without the `number` cheapest of each outer unit, filled up with the best others."""
    outer, keep = kept.shape
    costs = _total(f.costs(kept.ravel()) for f in fits).reshape(outer, keep)
    stay = np.argsort(costs, axis=1, kind="stable")[:, number:]
    rest = np.sort(np.take_along_axis(kept, stay, axis=1), axis=1)
    gone, brought = _gains(problems, rest.ravel(), outer * size)
    gains = brought.reshape(outer, -1)
    best = np.argsort(-gains, axis=1, kind="stable")[:, :number]
    back = np.take_along_axis(gone.reshape(outer, -1), best, axis=1)
    return np.sort(np.concatenate([rest, back], axis=1), axis=1)


def _exchanged_one(
    problems: Sequence[Problem], fits: Sequence[Fit], kept: IntArray, size: int, skip: int
) -> IntArray:
    """`kept` with the best other unit in place of the one that `skip` others are cheaper than."""
    outer, keep = kept.shape
    costs = _total(f.costs(kept.ravel()) for f in fits)
    place = int(np.argsort(costs, kind="stable")[skip])
    gone, gains = _gains(problems, np.delete(kept.ravel(), place), outer * size)
    here = gone // size == place // keep
    trial = kept.copy()
    trial.ravel()[place] = gone[here][int(np.argmax(gains[here]))]
    return np.sort(trial, axis=1)


def _gains(
    problems: Sequence[Problem], kept: IntArray, count: int
) -> tuple[IntArray, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """The units that are not kept, and what each of them would bring."""
    left = np.zeros(count, dtype=bool)
    left[kept] = True
    gone = np.flatnonzero(~left)
    return gone, _total(Fit(p, kept.tolist()).gains(gone) for p in problems)


def _total(
    parts: Iterable[np.ndarray[tuple[int], np.dtype[np.float64]]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.sum(list(parts), axis=0)  # type: ignore[no-any-return]
