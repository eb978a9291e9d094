"""What commands tell while they work, and how signals end them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

from graphprune.cli.progress import Bars, Lines, bar
from graphprune.progress import Note
from graphprune.ranks.environment import own_rank, started

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the present stage on stderr: a bar, or lines in a log.

    Files that are cut short while they are mapped end the command by an error meanwhile.
    """
    from rich.console import Console

    from graphprune.files.sources import reading

    console = Console(stderr=True, quiet=own_rank() > 0)
    if not console.is_terminal:
        with reading():
            yield _between(console, Lines(console).show)
        return
    with reading(), bar(console) as shown:
        yield _between(console, Bars(shown).show)


_SECONDS_FOR_THE_FIRST = 3.0


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Share the work of the block with the other processes that torchrun has started, if any.

    What all of them refuse, the first one says, and torchrun ends the others; so these wait before
    they say it as well.
    """
    if started() == 1:
        yield
        return
    from graphprune.ranks.launch import together

    with together() as ranks:
        try:
            yield
        except Exception:
            time.sleep(0 if ranks.lead else _SECONDS_FOR_THE_FIRST)
            raise


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Show the notes of an interruption, which click and Python end without a message."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as stopped:
        for note in getattr(stopped, "__notes__", ()):
            sys.stderr.write(f"{note}\n")
        raise


def use_threads(count: int | None) -> None:
    """Let torch and what reads OMP_NUM_THREADS compute with so many threads, if that is given."""
    if count is not None:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(count)
        torch.set_num_threads(count)


def _between(console: Console, show: Callable[[str], None]) -> Callable[[str], None]:
    """Show a stage, or print a note, unless the program has been told to stop."""

    def begin(stage: str) -> None:
        if _signals:
            _stop(_signals[0])
        if isinstance(stage, Note):
            console.print(f"note: {stage}", markup=False, highlight=False, soft_wrap=True)
        else:
            show(stage)

    return begin


_signals: list[int] = []
"""Signals to stop that have come. What they raise is lost if it comes up while Python collects
garbage, so that every stage looks here too."""

_ENDS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Let signals unwind the stack: SIGTERM's default action would leave a half-written output."""

    def stop(number: int, _: object) -> None:
        _signals.append(number)
        _stop(number)

    wanted = [one for one in _ENDS if signal.getsignal(one) != signal.SIG_IGN]  # as nohup has it
    before = {one: signal.signal(one, stop) for one in wanted}
    try:
        yield
    finally:
        _signals.clear()
        for one, handler in before.items():
            signal.signal(one, handler)


def _stop(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' warnings, logs and progress bars off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)
