"""Budgets: the widest model that fits a number of parameters, multiply-accumulates or bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from graphprune.analysis.cost import Cost
from graphprune.analysis.roles import ROLES
from graphprune.errors import PlanError
from graphprune.passes.selection.levers import Counts, Lever
from graphprune.passes.selection.scope import Candidate, Scope

RESOURCES: dict[str, Callable[[Cost], int]] = {
    "params": lambda cost: cost.params,
    "macs": lambda cost: cost.macs,
    "bytes": lambda cost: cost.bytes,
}
DEFAULT_ROLES = ("ffn", "heads", "channels", "experts")
KEPT_BY_DEFAULT = ("hidden", "layers", "qk_dim", "v_dim", "query_heads")
TOLERANCE = 0.005  # of the budget
RESOLUTION = 1 << 20  # common fractions that bisection tells apart
TRIALS = 64  # neighbours looked at where steps are coarse
EVERYTHING = 1024  # costs worth computing to look at all positions

COARSE = 1 / 4  # of a structure in one unit: three key-value heads lose a third or nothing
DEEPEST = 3 / 5  # of a width that a budget takes before it takes coarse units as well

Measure = Callable[[Counts], int]


def budget_roles(scope: Scope, roles: Sequence[str] | None) -> list[str]:
    """The model's roles that take part in a budget.

    By default those that cost the least quality per parameter; in a model that has none of them
    every width but the residual stream's and the head dimensions'.
    """
    if roles is not None:
        return list(dict.fromkeys(map(scope.role, roles)))
    prunable = scope.prunable_roles()
    usual = [r for r in map(scope.role, DEFAULT_ROLES) if r in prunable]
    usual += [r for r in prunable if r not in ROLES]  # people name what they want to prune
    found = usual or [r for r in prunable if r not in KEPT_BY_DEFAULT]
    if not found:
        raise PlanError(
            "there is nothing that a budget usually takes from",
            why=f"the model has {', '.join(prunable) or 'nothing to prune'}",
            hint="name the roles with roles=",
        )
    return found


def without_coarse(
    scope: Scope, names: Sequence[str], measure: Measure, budget: int
) -> Sequence[str]:
    """The roles of a budget, without those of coarse units where it can be met by the others.

    On SmolLM2-135M with 30 % fewer parameters the geometric mean of perplexity over dense on four
    texts was 2.25 by feed-forward channels alone, and 2.66 where every third head went as well.

    Args:
        scope: what may be touched.
        names: the roles.
        measure: cost of kept counts.
        budget: what the cost may be.
    """
    fine = [name for name in names if all(map(_is_fine, scope.candidates(name)))]
    kept = {
        c.structure.name: min(k for k in c.ladder.tolist() if k >= (1 - DEEPEST) * c.structure.size)
        for name in fine
        for c in scope.candidates(name)
    }
    return fine if fine and measure(kept) <= budget else names


def _is_fine(candidate: Candidate) -> bool:
    """Whether a structure can be narrowed a little; alignment may leave it no step at all."""
    if candidate.structure.blocks or len(candidate.ladder) == 1:
        return False
    return int(-np.diff(candidate.ladder).max()) <= COARSE * candidate.structure.size


def parse_target(target: Mapping[str, int | float], dense: Cost) -> tuple[str, int]:
    """The resource that a target names, and how much of it.

    Args:
        target: one resource to a fraction of the dense model (at most 1), or a whole number.
        dense: the cost of the dense model.

    Raises:
        PlanError: it is not one known resource with a sensible amount.
    """
    if len(target) != 1 or not target.keys() <= RESOURCES.keys():
        raise PlanError("a target names one of params, macs, bytes", where=f"target {dict(target)}")
    ((resource, amount),) = target.items()
    if not amount > 0 or (amount > 1 and amount != int(amount)):
        raise PlanError(
            f"{amount!r} is not a budget",
            where=f"target {resource}",
            hint="give a fraction of the dense model (at most 1), or a whole number",
        )
    return resource, int(amount if amount > 1 else amount * RESOURCES[resource](dense))


def check_reach(levers: Sequence[Lever], measure: Measure, budget: int, what: str = "") -> None:
    """See that a budget isn't below what all levers together leave.

    Raises:
        PlanError: it is; the message states the smallest that is reachable.
    """
    search = _Search(tuple(levers), measure, budget)
    least, dense = search.cost([lever.steps for lever in levers]), measure({})
    if least > budget:
        raise PlanError(
            f"the budget of {budget:,} {what} is not reachable",
            why=f"the smallest model that these roles, exclusions, floors and alignments leave has "
            f"{least:,}, {least / dense:.1%} of the dense model's {dense:,}",
            hint=f"ask for {least:,} or more, or let more roles take part",
        )


def fit(levers: Sequence[Lever], measure: Measure, budget: int, what: str = "") -> Counts:
    """Counts whose cost is at most the budget, and as near to it as sizes allow.

    All levers are first pulled by the largest common fraction that fits, found by bisection. What
    is left of the budget is then given back, in the coarsest steps that fit and then in finer
    ones, so that the result falls short by less than one step of the finest lever. Where that is
    more than 0.5 % below, some neighbours are tried: a lever is pulled a few steps further, and the
    others give back; then, where they aren't too many, all positions. Of those that come nearest,
    within 0.5 %, the most even one is taken.

    Args:
        levers: what may shrink; cost falls with every step of any of them.
        measure: cost of given counts.
        budget: what the cost may be.
        what: the resource, for messages.

    Raises:
        PlanError: even the smallest model exceeds the budget; the message states its cost.
    """
    search = _Search(tuple(levers), measure, budget)
    check_reach(levers, measure, budget, what)
    best = start = search.given_back(search.common())
    enough = budget * (1 - TOLERANCE)
    for trial in itertools.islice(search.neighbours(start), TRIALS):
        if search.cost(best) >= enough:
            break
        best = max(best, trial, key=search.cost)
    if search.cost(best) < enough:
        best = search.nearest(best, start)
    return search.counts(best)


@dataclass(frozen=True)
class _Search:
    """Positions of levers, and what they cost."""

    levers: tuple[Lever, ...]
    measure: Measure
    budget: int

    def counts(self, position: Sequence[int]) -> Counts:
        """Kept counts of all structures."""
        counts: Counts = {}
        for lever, k in zip(self.levers, position, strict=True):
            counts |= lever.at(k)
        return counts

    def cost(self, position: Sequence[int]) -> int:
        """Cost of a position."""
        return self.measure(self.counts(position))

    def common(self) -> list[int]:
        """All levers pulled by the least common fraction that fits."""

        def at(step: int) -> list[int]:
            return [lever.nearest(step / RESOLUTION) for lever in self.levers]

        return at(_first(RESOLUTION, lambda step: self.cost(at(step)) <= self.budget))

    def given_back(self, position: Sequence[int], but: int | None = None) -> list[int]:
        """`position`, which fits, with every lever but one let go as far as the budget allows."""
        result = list(position)
        free = [i for i, k in enumerate(result) if k and i != but]
        gain = {i: self.cost(_with(result, i, result[i] - 1)) for i in free}
        for i in sorted(free, key=lambda i: -gain[i]):
            fits = partial(self._fits, tuple(result), i)
            result[i] = _first(result[i], fits)
        return result

    def neighbours(self, position: Sequence[int]) -> Iterator[list[int]]:
        """Positions with one lever pulled a little further and the others given back."""
        for more in itertools.count(1):
            able = [i for i, k in enumerate(position) if k + more <= self.levers[i].steps]
            if not able:
                return
            for i in able:
                yield self.given_back(_with(position, i, position[i] + more), but=i)

    def nearest(self, best: list[int], even: Sequence[int]) -> list[int]:
        """Of all positions, where they aren't too many, one that comes nearest to the budget.

        Args:
            best: the nearest that is known.
            even: where every lever is pulled about as far; of equally near ones that which is
                least far from it is taken.
        """
        sizes = [lever.steps + 1 for lever in self.levers]
        finest = max(range(len(sizes)), key=sizes.__getitem__)
        others = [range(1) if i == finest else range(n) for i, n in enumerate(sizes)]
        if math.prod(map(len, others)) * sizes[finest].bit_length() > EVERYTHING:
            return best
        found = [(self.cost(best), list(best))]
        last = self.levers[finest].steps
        for position in itertools.product(*others):
            fits = partial(self._fits, position, finest)
            if fits(last):
                one = _with(position, finest, _first(last, fits))
                found.append((self.cost(one), one))
        enough = (1 - TOLERANCE) * max(cost for cost, _ in found)

        def unevenness(position: Sequence[int]) -> float:
            each = zip(position, even, sizes, strict=True)
            return max(abs(k - usual) / size for k, usual, size in each)

        return min((p for cost, p in found if cost >= enough), key=unevenness)

    def _fits(self, position: Sequence[int], lever: int, k: int) -> bool:
        return self.cost(_with(position, lever, k)) <= self.budget


def _with(position: Sequence[int], lever: int, k: int) -> list[int]:
    return [k if i == lever else other for i, other in enumerate(position)]


def _first(last: int, holds: Callable[[int], bool]) -> int:
    """The least number of 0 to `last` for which `holds`; it does for `last` and all above it."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high
