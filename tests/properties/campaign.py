"""The long run: many random graphs, going on after failures, and after an interruption.

    PYTHONPATH=.:tests python tests/properties/campaign.py FIRST LAST [--state FILE] [--reduce]

A graph takes about half a second, most of it in torch.export, so it gets a single plan here.
Every failing seed is printed with what went wrong; with ``--reduce`` also the small recipe and the
small plan that fail in the same way, to be pasted into test_found.py. With ``--state`` a second run
of the same command goes on behind the seeds that are done; a seed that ended the process counts as
a failure. In the background: ``nohup nice ... > campaign.log &``.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

import torch

from properties import onnx_check, onnx_drawing
from properties.check import Unsuitable, examine
from properties.drawing import draw
from properties.reduce import failure, reduce, smallest_plan

SLOW = 300  # seconds for a graph, after which something hangs


class State:
    """How far a campaign is, in a file, so that it can go on later.

    Attributes:
        next: the seed to go on with.
        done: numbers of graphs, plans and failures.
        failed: seed to what went wrong.
    """

    def __init__(self, path: Path | None, first: int) -> None:
        self.path, self.next = path, first
        self.done: Counter[str] = Counter()
        self.failed: dict[int, str] = {}
        if path is not None and path.exists():
            held = json.loads(path.read_text())
            self.next, self.done = held["next"], Counter(held["done"])
            self.failed = {int(seed): why for seed, why in held["failed"].items()}
            if held["running"]:
                self.fail(self.next, "it ended the process")
                self.next += 1

    def fail(self, seed: int, why: str) -> None:
        self.failed[seed] = why
        self.done["failures"] += 1
        print(f"FAILED {seed} {why}", flush=True)

    def save(self, *, running: bool) -> None:
        if self.path is not None:
            held = {"next": self.next, "running": running, "done": self.done}
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(held | {"failed": self.failed}))
            new.replace(self.path)


def torch_graph(seed: int) -> int:
    """Examine a graph of torch; the number of plans."""
    return examine(draw(random.Random(seed)), seed, count=1, module=True)


def onnx_graph(seed: int) -> int:
    """Examine a graph of ONNX; the number of plans."""
    try:
        return onnx_check.examine(onnx_drawing.draw(random.Random(seed)), seed)
    except Unsuitable:
        return 0


def reduced(seed: int) -> str:
    """The small graph of torch that fails as the one of a seed does, and the small plan."""
    recipe = draw(random.Random(seed))
    if failure(recipe, seed, module=True) is None:
        return "no failure with other plans"
    recipe = reduce(recipe, seed, module=True)
    plan = smallest_plan(recipe, seed, module=True)
    return f"  {recipe}\n  {plan and dict(plan.kept_units)}"


def run(kind: str, state: State, last: int, seconds: float, small: bool) -> None:
    """Examine the graphs of the seeds up to the last one."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _run(kind, state, last, time.monotonic() + seconds, small)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    state.save(running=False)
    print(f"{dict(state.done)}, seeds that failed: {sorted(state.failed)}", flush=True)


def _run(kind: str, state: State, last: int, end: float, small: bool) -> None:
    examine_one = {"torch": torch_graph, "onnx": onnx_graph}[kind]
    while state.next < last and time.monotonic() < end:
        seed = state.next
        state.save(running=True)
        signal.alarm(SLOW)
        try:
            plans = examine_one(seed)
            state.done["plans"] += plans
            state.done["without a plan"] += not plans
        except Exception as error:
            signal.alarm(0)
            why = " | ".join(str(error).splitlines()[:3])[:300]
            state.fail(seed, f"{type(error).__name__}: {why}")
            if small and kind == "torch":
                print(reduced(seed), flush=True)
        signal.alarm(0)
        state.done["graphs"] += 1
        state.next += 1
        if state.done["graphs"] % 200 == 0:
            print(f"at seed {seed}: {dict(state.done)}", flush=True)


def _hangs(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"not done after {SLOW} seconds")


def main() -> int:
    """Run what the command line says; 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("first", type=int, help="the first seed")
    parser.add_argument("last", type=int, help="the seed behind the last one")
    parser.add_argument("--kind", choices=("torch", "onnx"), default="torch", help="of graph")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--state", type=Path, help="a file to go on from, and to keep")
    parser.add_argument("--reduce", action="store_true", help="make failing graphs small")
    given = parser.parse_args()
    state = State(given.state, given.first)
    run(given.kind, state, given.last, given.seconds, given.reduce)
    return int(bool(state.failed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    gc.set_threshold(100_000)  # traced graphs are full of cycles, and looking for them takes long
    sys.exit(main())
