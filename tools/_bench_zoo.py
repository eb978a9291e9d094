"""tools/bench zoo: time to plan and to apply, of the transformers zoo and of a ResNet-50.

These are times of one machine, not ratios: what counts is that nobody waits.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

BAR = 2.0  # seconds, to plan and apply


def main(names: list[str]) -> int:
    """Print a line per model and return the exit status: 1 where one takes longer than the bar.

    Args:
        names: the models; all of them if empty.
    """
    warnings.simplefilter("ignore")
    print(f"remove half of everything, random scores, {torch.get_num_threads()} threads")
    print(f"{'model':24s}  trace s  plan s  apply s  both s  module s")
    slow, both = [], []
    for name, trace in _models():
        if names and name not in names:
            continue
        gc.collect()
        traced, planned, applied, resized = _times(trace)
        both.append(planned + applied)
        slow += [name] * (both[-1] > BAR)
        times = f"{traced:8.2f} {planned:7.3f} {applied:8.3f} {both[-1]:7.3f} {resized:9.3f}"
        print(f"{name:24s} {times}", flush=True)
    print(f"median {statistics.median(both):.3f} s, longest {max(both):.3f} s, bar {BAR} s")
    return bool(slow)


def _times(trace: Callable[[], Any]) -> tuple[float, ...]:
    """Seconds to trace, to plan, to apply, and to resize the module."""
    import graphprune as gp

    moments = [time.perf_counter()]
    program = trace()
    moments.append(time.perf_counter())
    plan = gp.select(program, remove={"*": 0.5}, score="random", seed=3)
    moments.append(time.perf_counter())
    slim = gp.apply(program, plan)
    moments.append(time.perf_counter())
    slim.module  # noqa: B018  (made at first use)
    moments.append(time.perf_counter())
    return tuple(after - before for before, after in pairwise(moments))


def _models() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to measure: name and how to trace it."""
    from _bench_models import resnet50_module

    import graphprune as gp

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from zoo.expected_pretrained import MODELS

    for model in MODELS:
        yield model.build.__name__, model.trace
    yield "resnet50", lambda: gp.trace(resnet50_module(), (torch.randn(1, 3, 224, 224),))
