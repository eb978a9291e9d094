"""What a command shows while it works."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from graphprune.cli import progress
from graphprune.progress import Pace, Part


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    monkeypatch.setattr(progress, "Pace", lambda: Pace(found.monotonic))
    return found


def test_a_log_has_a_line_a_minute(clock):
    stream = io.StringIO()
    lines = progress.Lines(Console(file=stream, width=40))
    lines.show("loading and tracing")
    lines.show("pruning weights")
    for done in range(1, 13):
        clock.now += 25
        lines.show(Part("pruning weights", done, 12, unit="group", rest=f", layer {done} " * 4))
    told = [line.split(", layer")[0] for line in stream.getvalue().splitlines()]
    # After 75, 150, 225 and 300 seconds.
    assert told == [
        "loading and tracing ...",
        "pruning weights ...",
        "pruning weights: group 3 of 12",
        "pruning weights: group 6 of 12",
        "pruning weights: group 9 of 12",
        "pruning weights: group 12 of 12",
    ]
    assert "about 4 minutes left" in stream.getvalue().splitlines()[2]  # nine times 25 seconds
    assert "left" not in stream.getvalue().splitlines()[-1]


def test_a_stage_in_parts_needs_no_name_before(clock):
    stream = io.StringIO()
    lines = progress.Lines(Console(file=stream))
    lines.show(Part("packing", 1, 2))
    lines.show(Part("packing", 2, 2))
    assert stream.getvalue() == "packing: 2 of 2\n"


def test_a_terminal_has_one_bar(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress.bar(console) as shown:
        bars = progress.Bars(shown)
        bars.show("loading and tracing")
        (task,) = shown.tasks
        assert (task.description, task.total) == ("loading and tracing", None)
        bars.show("pruning weights")
        clock.now += 30
        bars.show(Part("pruning weights", 1, 5, unit="group"))
        (task,) = shown.tasks
        assert (task.description, task.completed, task.total) == ("pruning weights", 1, 5)
        assert task.fields["left"] == "about 2 minutes left"
        bars.show("verifying")
        (task,) = shown.tasks
        assert (task.description, task.total, task.fields["left"]) == ("verifying", None, "")


def test_what_an_interrupted_run_had_done_says_nothing_of_the_rest(clock):
    pace = Pace(clock.monotonic)
    for done in (1, 2, 3):
        clock.now += 0.1
        assert pace.left(Part("training", done, 10, quick=True)) is None
    clock.now += 20
    assert pace.left(Part("training", 4, 10)) == pytest.approx(6 * 20)
    assert pace.left(Part("training", 5, 10, left=7.0)) == 7.0
