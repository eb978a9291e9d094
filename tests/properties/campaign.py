"""The long run: many random graphs, going on after a failure.

    PYTHONPATH=.:tests python tests/properties/campaign.py FIRST LAST [SECONDS]

A graph takes about a tenth of a second, most of it in torch.export, so it gets a single plan here.
Every failing seed is printed with what went wrong; with ``--reduce`` also the small recipe and the
small plan that fail in the same way, to be pasted into test_found.py.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections import Counter

import torch

from properties.check import examine
from properties.drawing import draw
from properties.reduce import failure, reduce, smallest_plan


def run(first: int, last: int, seconds: float = 1e9, small: bool = False) -> Counter[str]:
    """Examine the graphs of some seeds.

    Args:
        first: the first seed.
        last: where to stop.
        seconds: when to stop before that.
        small: reduce every failure.

    Returns:
        Numbers of graphs, plans and failures.
    """
    done: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for seed in range(first, last):
        if time.monotonic() > end:
            break
        recipe = draw(random.Random(seed))
        done["graphs"] += 1
        try:
            plans = examine(recipe, seed, count=1)
            done["plans"] += plans
            done["without a plan"] += not plans
        except Exception as error:
            done["failures"] += 1
            why = " | ".join(str(error).splitlines()[:3])[:300]
            print(f"FAILED {seed} {type(error).__name__}: {why}", flush=True)
            if small and failure(recipe, seed) is not None:
                recipe = reduce(recipe, seed)
                plan = smallest_plan(recipe, seed)
                print(f"  {recipe}\n  {plan and dict(plan.kept_units)}", flush=True)
        if done["graphs"] % 200 == 0:
            print(f"at seed {seed}: {dict(done)}", flush=True)
    print(f"{dict(done)}", flush=True)
    return done


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.set_threshold(100_000)  # traced graphs are full of cycles, and looking for them takes long
    numbers = [float(x) for x in sys.argv[1:] if not x.startswith("-")]
    found = run(int(numbers[0]), int(numbers[1]), *numbers[2:], small="--reduce" in sys.argv)
    sys.exit(bool(found["failures"]))
