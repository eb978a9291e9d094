"""Best-first search over a handful of small choices.

Both the attributes of a resized module and the fields of its config are found by trying: every
choice has a most likely option (number 0), and usually taking all of them is right at once. Where
it is not, the search changes one choice at a time: in turns from the best attempt so far, and from
what is nearest to the start, since an attempt may be good by coincidence.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DETOUR = 2
"""How many deviations a choice that is hardly to blame counts for."""

State = tuple[int, ...]
"""The option taken for every choice."""


@dataclass(frozen=True)
class Verdict:
    """What came of trying one state.

    Attributes:
        passed: The state is a solution.
        cost: How far it is from one, lower is better; ``None`` if that could not be measured, and
            then the cost of the state that it was derived from stands.
        focus: The choices to change next, most suspicious first; ``None`` for all, in order.
        later: Further choices, which are hardly to blame.
    """

    passed: bool
    cost: float | None = None
    focus: Sequence[int] | None = None
    later: Sequence[int] = ()


def best_first(
    options: Sequence[int], evaluate: Callable[[State], Verdict], limit: int
) -> tuple[State, bool]:
    """Look for a state that passes.

    Args:
        options: The number of options of each choice.
        evaluate: Tries a state.
        limit: The largest number of states to try, at least 1.

    Returns:
        The first state that passed and ``True``, or the cheapest one tried and ``False``.
    """
    start: State = (0,) * len(options)
    # What is waiting, in two orders: low costs first, and few deviations from the start first.
    # Then what is more suspicious to the caller, then what was seen earlier.
    cheap: list[tuple[float, int, int, int, State]] = [(0.0, 0, 0, 0, start)]
    near: list[tuple[int, float, int, int, State]] = []
    seen, tried = {start}, set[State]()
    best: tuple[float, State] | None = None
    while len(tried) < limit and (cheap or near):
        if near and (len(tried) % 2 or not cheap):
            _, inherited, _, _, state = heapq.heappop(near)
        else:
            inherited, _, _, _, state = heapq.heappop(cheap)
        if state in tried:
            continue
        tried.add(state)
        verdict = evaluate(state)
        if verdict.passed:
            return state, True
        if verdict.cost is not None and (best is None or verdict.cost < best[0]):
            best = verdict.cost, state
        cost = inherited if verdict.cost is None else verdict.cost
        focus = range(len(options)) if verdict.focus is None else verdict.focus
        for rank, position in enumerate((*focus, *verdict.later)):
            for option in range(options[position]):
                following = (*state[:position], option, *state[position + 1 :])
                if following not in seen:
                    seen.add(following)
                    far = sum(map(bool, following)) + DETOUR * (rank >= len(focus))
                    heapq.heappush(cheap, (cost, far, rank, len(seen), following))
                    heapq.heappush(near, (far, cost, rank, len(seen), following))
    return (start if best is None else best[1]), False
