"""tools/bench ranks: one compilation's mask pass, by one process and by several.

Every process has one thread. Wall time is that of the pass, from the moment when all have loaded
the model. On a machine that does something else as well it says little; so there is the longest
way, too: of every group of weights the processor time of the process that took most of it, added
up. It is the wall time of processes that have a core each and speak in no time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from _bootstrap import ROOT, environment

BAR = 0.6
"""Wall time of two processes over that of one, at most."""


def main(options: argparse.Namespace) -> int:
    """Run all numbers of processes in turns; return the exit status."""
    sizes = f"{options.windows} windows of {options.length} tokens"
    print(f"SparseGPT 50 % on {options.layers} layers, {sizes}; best of {options.turns}")
    found: dict[int, dict[str, float]] = {}
    for _ in range(options.turns):
        for ranks in options.ranks:
            new = _run(options, ranks)
            old = found.get(ranks, new)
            found[ranks] = {name: min(old[name], new[name]) for name in new}
    print("processes  wall s  of one  longest way s  of one")
    one = found[min(found)]
    for ranks, took in found.items():
        wall, way = took["wall"], took["way"]
        print(
            f"{ranks:9d} {wall:7.1f} {wall / one['wall']:7.2f} {way:14.1f} {way / one['way']:7.2f}",
            flush=True,
        )
    missed = 2 in found and 1 in found and found[2]["wall"] > BAR * found[1]["wall"]
    if missed:
        print(f"two processes take more than {BAR} of the time of one")
    return int(missed)


def _run(options: argparse.Namespace, ranks: int) -> dict[str, float]:
    """Start processes as torchrun does; what the first one prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    given = {n: getattr(options, n) for n in ("model", "layers", "windows", "length")}
    command += ["--nproc-per-node", str(ranks), str(Path(__file__)), json.dumps(given)]
    done = subprocess.run(
        command,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(given: dict[str, Any]) -> None:
    """What every process does; the first one prints the times."""
    import torch

    import graphprune as gp
    from graphprune.passes.masks import SparseGPT
    from graphprune.solvers import Unstructured
    from graphprune.streaming import text_windows

    torch.set_num_threads(1)
    model = given["model"] or _smollm2()
    with gp.together() as ranks:
        program = gp.load(model)
        count, length = given["windows"], given["length"]
        # The text isn't long enough, and what it says doesn't count here.
        some = text_windows(program, count=min(count, 65536 // length), length=length)
        windows = some.repeat(-(-count // len(some)), 1)[:count]
        ticks = [0.0]

        def tick(step: object) -> None:
            ticks.append(time.process_time())

        ranks.agree(lambda: None)  # all have loaded it
        begun, ticks[0] = time.perf_counter(), time.process_time()
        gp.sparsify(
            program,
            windows,
            SparseGPT(),
            Unstructured(0.5),
            include=[f"model.layers.{i}.*" for i in range(given["layers"])],
            progress=tick,
        )
        wall = time.perf_counter() - begun
        steps = [b - a for a, b in pairwise(ticks)]
        way = sum(map(max, zip(*ranks.agree(lambda: steps), strict=True)))
        if ranks.lead:
            print(json.dumps({"wall": wall, "way": way}))


def _smollm2() -> str:
    tool = [sys.executable, str(ROOT / "tools" / "models"), "--path", "smollm2"]
    return subprocess.run(tool, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
