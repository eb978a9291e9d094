"""When units go, and how many: the cubic schedule, whose last event has exact counts."""

import numpy as np
import pytest

from graphprune.errors import RecipeError
from graphprune.passes.loraprune import Pruning
from graphprune.passes.loraprune.options import Schedule
from graphprune.passes.loraprune.units import lowest, so_far

HALF = 0.5
TABLE = {
    0: 0, 5: 0, 10: 0, 11: 0.018517, 15: 0.088013, 20: 0.165039, 30: 0.289062, 40: 0.37793,
    50: 0.4375, 60: 0.473633, 70: 0.492188, 80: 0.499023, 89: 0.499999, 90: 0.5, 91: 0.5, 100: 0.5,
}  # fmt: skip


def test_the_share_rises_along_a_cubic():
    found = {step: HALF * Schedule().share(step, 100) for step in TABLE}
    assert found == pytest.approx(TABLE, abs=1e-6)


def gone(units, steps, schedule=None):
    """Units that have gone after each event, of those of which half go in the end."""
    schedule, count = schedule or Schedule(), 0
    found = []
    for step in schedule.events(steps):
        count = so_far(schedule.share(step, steps), units // 2, count)
        found.append(count)
    return found


def test_counts_of_the_paper_and_the_last_ones_exact():
    """LoRAPrune's code stops before its schedule ends: with 15 of 32 heads, 5,493 of 11,008."""
    assert Schedule().events(100) == (20, 30, 40, 50, 60, 70, 80, 90)
    assert gone(32, 100) == [5, 9, 12, 14, 15, 16, 16, 16]
    assert gone(11008, 100) == [1817, 3182, 4160, 4816, 5214, 5418, 5493, 5504]
    assert gone(32, 400)[-1] == 16
    assert gone(11008, 400)[-2:] == [5504, 5504]
    assert int(11008 * HALF * Schedule().share(350, 400)) == 5503  # where the code stops


@pytest.mark.parametrize("steps", range(1, 41))
def test_every_length_ends_with_all_gone_before_what_is_left_trains(steps):
    schedule = Schedule()
    events = schedule.events(steps)
    assert schedule.share(events[-1], steps) == 1
    assert all(schedule.share(step, steps) < 1 for step in events[:-1])
    assert events[-1] <= max(1, np.ceil(0.9 * steps))
    assert gone(11008, steps)[-1] == 5504
    if steps >= 12:
        assert len(events) >= 8


def test_steps_between_two_events():
    assert Schedule(every=25).events(100) == (35, 60, 85, 90)
    assert Schedule(initial=0.0, final=0.0, every=10).events(30) == (1, 10, 20, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0.6, "final": 0.6}, "pruning would end before it begins"),
        ({"every": 0}, "every"),
        ({"average": 1.0}, "no share below 1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(RecipeError, match=message):
        Pruning({"remove": {"ffn": 0.5}}, **options)


def test_the_lowest_go_of_equals_the_later_and_what_has_gone_stays_gone():
    scores = np.array([3.0, 1.0, 0.0, 1.0, 2.0])
    before = np.array([True, False, False, False, False])
    assert lowest(scores, before, 3).tolist() == [True, False, True, True, False]
    assert lowest(scores, np.zeros(5, bool), 0).tolist() == [False] * 5


def test_each_row_of_a_ragged_structure_loses_as_many():
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    before = np.array([[False, False, True], [False, False, False]])
    before[1, 2] = True
    assert lowest(scores, before, 2).tolist() == [[False, True, True], [True, False, True]]
