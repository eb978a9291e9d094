"""tools/bench train: speed and memory of training, against transformers' Trainer.

Both train the same model on the same windows of text, each in a process of its own on one thread.
They take turns, step by step, so that whatever else runs on the machine slows down both alike; the
first step of each warms up. Times are processor time. Peaks are those of whole processes, which
have nothing else in common than that each of them loads the model and trains it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import IO, Any

from _bootstrap import ROOT

PARTS = ("full", "masks", "lora")
SIDES = ("ours", "trainer")
SPEED = 1.0  # our tokens a second over the Trainer's, at least
MEMORY = 1.0  # our peak over the Trainer's, at most
_SAME = 0.01  # relative difference of the first loss, at most: products are in bfloat16


@dataclass(frozen=True)
class Settings:
    """What every run is given.

    Attributes:
        model: checkpoint directory.
        text: what to train on.
        windows: in a step.
        length: tokens in a window.
        steps: that are timed; one more warms up.
    """

    model: str = ""
    text: str = "builtin"
    windows: int = 4
    length: int = 256
    steps: int = 7


@dataclass(frozen=True)
class Measured:
    """What a run has cost.

    Attributes:
        seconds: processor time of each step.
        peak: bytes, of the process up to the end of training.
        loss: of the first step.
    """

    seconds: tuple[float, ...]
    peak: int
    loss: float


def main(options: argparse.Namespace) -> int:
    """Print what is found; 0 where every bar is reached, 1 otherwise."""
    given = {f.name: getattr(options, f.name) for f in fields(Settings)}
    settings = Settings(**{**given, "model": given["model"] or smollm2()})
    print(
        f"{Path(settings.model).name}, {settings.steps} steps of {settings.windows} windows of "
        f"{settings.length}, 1 thread\n"
        f"{'':8s} {'tokens a second':>23s} {'':7s} {'peak MiB':>17s}\n"
        f"{'':8s} {'graphprune':>11s} {'Trainer':>11s} {'ratio':>7s} {'graphprune':>11s} "
        f"{'Trainer':>8s} {'ratio':>7s}"
    )
    reached = True
    for part in options.parts or PARTS:
        ours, trainer = _together(part, settings)
        if abs(ours.loss - trainer.loss) > _SAME * trainer.loss:
            raise SystemExit(f"{part}: the first losses are {ours.loss} and {trainer.loss}")
        tokens = settings.windows * settings.length
        pairs = zip(ours.seconds, trainer.seconds, strict=True)
        speed = median(theirs / own for own, theirs in pairs)
        memory = ours.peak / trainer.peak
        reached &= speed >= SPEED and memory <= MEMORY
        print(
            f"{part:8s} {tokens / median(ours.seconds):11.0f} "
            f"{tokens / median(trainer.seconds):11.0f} {speed:7.2f} {ours.peak / 2**20:11.0f} "
            f"{trainer.peak / 2**20:8.0f} {memory:7.2f}",
            flush=True,
        )
    bars = f"at least {SPEED} of the Trainer's speed, at most {MEMORY} of its memory"
    print(f"{'reached' if reached else 'MISSED '}  {bars}")
    return 0 if reached else 1


def _together(part: str, settings: Settings) -> list[Measured]:
    """Both runs of a kind of training, step by step in turns."""
    with _started("ours", part, settings) as ours, _started("trainer", part, settings) as trainer:
        both = (ours, trainer)
        seconds: tuple[list[float], ...] = ([], [])
        for one in both:
            _next(one)  # loads, and warms up
        for _ in range(settings.steps):
            for one, times in zip(both, seconds, strict=True):
                _go(one)
                times.append(_next(one)["seconds"])
        found = []
        for one, times in zip(both, seconds, strict=True):
            _go(one)
            found.append(Measured(tuple(times), **_next(one)))
        return found


@contextmanager
def _started(side: str, part: str, settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, which waits after each step."""
    text = json.dumps({"side": side, "part": part, "settings": asdict(settings)})
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = Path(__file__).with_name("_bench_train_sides.py")
    with subprocess.Popen(
        [sys.executable, str(program), text],
        env=os.environ | threads,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if sys.exc_info()[0] is not None:
                process.kill()


def _go(process: subprocess.Popen[str]) -> None:
    _pipe(process.stdin).write("\n")
    _pipe(process.stdin).flush()


def _next(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a run says next."""
    line = _pipe(process.stdout).readline()
    if not line:
        raise SystemExit(f"a run ended with {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def smollm2() -> str:
    tool = [sys.executable, str(ROOT / "tools" / "models"), "--path", "smollm2"]
    return subprocess.run(tool, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
