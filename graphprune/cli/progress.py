"""How a command shows what it is doing: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from graphprune.progress import Pace, Part

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

MINUTE = 60.0
"""Seconds between two lines on the parts of one stage."""


class Lines:
    """A line for each stage, and one a minute, and at its end, for a stage in parts."""

    def __init__(self, console: Console) -> None:
        """Nothing has been told yet."""
        self._console = console
        self._stage = ""
        self._pace = Pace()
        self._told = time.monotonic()

    def show(self, stage: str) -> None:
        """Tell of a stage that begins, or of a part of one that is over."""
        if not isinstance(stage, Part):
            self._begin(stage)
            self._print(f"{stage} ...")
            return
        if stage.stage != self._stage:
            self._begin(stage.stage)
        left = self._pace.left(stage)
        if stage.done == stage.total or time.monotonic() - self._told >= MINUTE:
            ahead = "" if left is None or stage.done == stage.total else f", {_about(left)} left"
            self._print(f"{stage}{ahead}")

    def _begin(self, stage: str) -> None:
        self._stage, self._pace = stage, Pace()
        self._told = time.monotonic()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._told = time.monotonic()


class Bars:
    """One bar, of the present stage; it has a length where the stage has parts."""

    def __init__(self, progress: Progress) -> None:
        """A bar without a stage."""
        self._progress = progress
        self._task = progress.add_task("starting", total=None, left="")
        self._stage = ""
        self._pace = Pace()

    def show(self, stage: str) -> None:
        """Show a stage that begins, or a part of one that is over."""
        name = stage.stage if isinstance(stage, Part) else stage
        if name != self._stage:
            self._stage, self._pace = name, Pace()
            self._progress.remove_task(self._task)
            self._task = self._progress.add_task(name, total=None, left="")
        if isinstance(stage, Part):
            left = self._pace.left(stage)
            words = "" if left is None else f"{_about(left)} left"
            self._progress.update(self._task, completed=stage.done, total=stage.total, left=words)


def bar(console: Console) -> Progress:
    """A bar as `Bars` fills it, which goes when the command is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
    )


def _about(seconds: float) -> str:
    from graphprune.report.forecast import about_time

    return f"about {about_time(seconds)}"
