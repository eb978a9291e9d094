"""Best-first search over a handful of small choices.

Both the attributes of a resized module and the fields of its config are found by trying: every
choice has a most likely option (number 0), and usually taking all of them is right at once. Where
it is not, the search changes one choice at a time, nearest to the best attempt so far first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """

    passed: bool
    cost: float | None = None
    focus: Sequence[int] | None = None


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
    # The order within equal costs: few deviations from the start, then the caller's suspicion.
    queue: list[tuple[float, int, int, int, State]] = [(0.0, 0, 0, 0, start)]
    seen = {start}
    best: tuple[float, State] | None = None
    for _ in range(limit):
        if not queue:
            break
        inherited, _, _, _, state = heapq.heappop(queue)
        verdict = evaluate(state)
        if verdict.passed:
            return state, True
        if verdict.cost is not None and (best is None or verdict.cost < best[0]):
            best = verdict.cost, state
        cost = inherited if verdict.cost is None else verdict.cost
        focus = range(len(options)) if verdict.focus is None else verdict.focus
        for rank, position in enumerate(focus):
            for option in range(options[position]):
                following = (*state[:position], option, *state[position + 1 :])
                if following not in seen:
                    seen.add(following)
                    deviations = sum(map(bool, following))
                    heapq.heappush(queue, (cost, deviations, rank, len(seen), following))
    return (start if best is None else best[1]), False
