"""tools/bench oneshot: cost of one-shot pruning, against a plain implementation of the papers.

Every run is a process of its own on one thread. Costs are processor time, so that other programs
on the machine count little, and are given in plain passes: a forward pass of the same calibration
windows through the decoder stack, which the same process runs after pruning. Peaks are those of the
whole process up to the end of pruning, libraries included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _bootstrap import ROOT
from torch import Tensor

if TYPE_CHECKING:
    from graphprune.ir.torch.program import Program

PARTS = ("cost", "memory")
PASSES = {"sparsegpt": 2.2, "alps": 4.0, "wanda": 1.6}  # plain passes, at most
HALF = 0.5  # our wall time over that of the plain implementation, at most, for SparseGPT
PEAKS = {"wanda": 3.0, "sparsegpt": 4.0}  # GB, of a model of a billion weights
GB = 1e9


@dataclass(frozen=True)
class Settings:
    """What every run is given.

    Attributes:
        model: checkpoint directory.
        calibration: text to calibrate on.
        evaluation: text to measure perplexity on.
        windows: of both.
        length: tokens in a window.
        sparsity: of every layer.
    """

    model: str = ""
    calibration: str = ""
    evaluation: str = ""
    windows: int = 64
    length: int = 512
    sparsity: float = 0.6


@dataclass(frozen=True)
class Measured:
    """What a run has cost.

    Attributes:
        cpu, wall: seconds of pruning, without loading.
        load: processor seconds of loading.
        plain: processor seconds of a plain pass.
        peak: bytes, of the process up to the end of pruning.
        perplexity: of the pruned model; 0 where it isn't measured.
        saved: bytes, of the process up to the end of writing the weights; 0 where it doesn't save.
    """

    cpu: float
    wall: float
    load: float
    plain: float = 0.0
    peak: int = 0
    perplexity: float = 0.0
    saved: int = 0


@dataclass
class Clock:
    """Processor and wall time of a block of code."""

    cpu: float = field(default=0.0, init=False)
    wall: float = field(default=0.0, init=False)

    def __enter__(self) -> Clock:
        self._began = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += time.process_time() - self._began[0]
        self.wall += time.perf_counter() - self._began[1]


def main(options: argparse.Namespace) -> int:
    """Print what is found; 0 where every bar is reached, 1 otherwise."""
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    parts = options.parts or PARTS
    reached = True
    if "cost" in parts:
        reached &= _cost(_complete(settings))
    if "memory" in parts:
        reached &= _memory(settings)
    return 0 if reached else 1


def run_here(text: str) -> None:
    """Do a run in this process and print what it measures as JSON."""
    given = json.loads(text)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    settings = Settings(**given["settings"])
    with contextlib.redirect_stdout(io.StringIO()):
        found = _JOBS[given["job"]](settings, given["method"])
    print(json.dumps(asdict(found)))


def _cost(settings: Settings) -> bool:
    print(
        f"{Path(settings.model).name}, {settings.windows} windows of {settings.length}, sparsity "
        f"{settings.sparsity:g}, 1 thread\n"
        f"{'':28s} cpu s  wall s  passes  peak MiB  perplexity"
    )
    found: dict[tuple[str, str], Measured] = {}
    for method in ("sparsegpt", "wanda", "alps"):
        for job in ("ours", "paper") if method != "alps" else ("ours",):
            one = found[job, method] = _process(job, method, settings)
            passes = f"{one.cpu / one.plain:7.2f}"
            print(
                f"{method:10s} {_TITLES[job]:16s} {one.cpu:6.1f} {one.wall:7.1f} {passes} "
                f"{one.peak / 2**20:9.0f} {one.perplexity:11.3f}",
                flush=True,
            )
    print(f"a plain pass: {', '.join(f'{one.plain:.1f}' for one in found.values())} s")
    checks = []
    for method in ("sparsegpt", "wanda"):
        ours, paper = found["ours", method], found["paper", method]
        text = (
            f"{method}: {ours.wall / paper.wall:.2f} of the plain implementation's wall time, "
            f"{ours.cpu / paper.cpu:.2f} of its processor time, {ours.peak / paper.peak:.2f} of "
            f"its peak; perplexity {ours.perplexity:.3f} against {paper.perplexity:.3f}"
        )
        if method == "sparsegpt":
            better = ours.perplexity <= paper.perplexity and ours.peak < paper.peak
            checks.append((text, better and ours.wall <= HALF * paper.wall))
        else:
            print(text)
    for method, bar in PASSES.items():
        passes = found["ours", method].cpu / found["ours", method].plain
        checks.append((f"{method}: {passes:.2f} plain passes, at most {bar}", passes <= bar))
    return _report(checks)


def _memory(settings: Settings) -> bool:
    from _bench_oneshot_billion import describe, write

    checks = []
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        model = Path(folder) / "model"
        write(model)
        print(f"{describe(model)}; 16 windows of 512, sparsity {settings.sparsity:g}")
        given = Settings(str(model), windows=16, length=512, sparsity=settings.sparsity)
        for method, bar in PEAKS.items():
            one = _process("billion", method, given)
            text = (
                f"{method}: {one.peak / GB:.2f} GB at most when pruned, {one.saved / GB:.2f} GB "
                f"when saved, bar {bar} GB; {one.cpu:.0f} s"
            )
            checks.append((text, one.saved < bar * GB))
            print(text, flush=True)
    return _report(checks)


def _report(checks: list[tuple[str, bool]]) -> bool:
    for text, reached in checks:
        print(f"{'reached' if reached else 'MISSED '}  {text}")
    return all(reached for _, reached in checks)


_TITLES = {"ours": "graphprune", "paper": "as in the paper"}


def _process(job: str, method: str, settings: Settings) -> Measured:
    """A run in a process of its own."""
    text = json.dumps({"job": job, "method": method, "settings": asdict(settings)})
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, text]
    done = subprocess.run(
        command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{job} {method} ended with {done.returncode}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _complete(settings: Settings) -> Settings:
    """The settings with paths in place of what was left out."""
    if settings.model:
        return settings
    tool = [sys.executable, str(ROOT / "tools" / "models"), "--path", "smollm2"]
    path = subprocess.run(tool, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return Settings(**(asdict(settings) | {"model": path}))


def _windows(settings: Settings) -> tuple[Tensor, Tensor]:
    """Calibration and evaluation windows: the first of each text, without special tokens."""
    from graphprune.calibration.text.read import load_tokenizer, read_text

    tokenizer = load_tokenizer(Path(settings.model))
    found = []
    for source in (settings.calibration, settings.evaluation):
        tokens = tokenizer(read_text(source), add_special_tokens=False, verbose=False)["input_ids"]
        wanted = settings.windows * settings.length
        if source == settings.calibration == settings.evaluation:
            tokens = tokens[wanted:] if found else tokens  # one text: its second part
        if len(tokens) < wanted:
            raise SystemExit(f"{source} has {len(tokens)} tokens, {wanted} are needed")
        found.append(torch.tensor(tokens[:wanted]).view(-1, settings.length))
    return found[0], found[1]


def _pass(model: Any, windows: Tensor, clock: Clock) -> None:
    """A plain pass."""
    with clock, torch.inference_mode():
        for window in windows.split(1):
            model.model(input_ids=window, use_cache=False)


def _ours(settings: Settings, method: str) -> Measured:
    """Prune with graphprune, as `compile` does: new weights go to files, group by group."""
    import graphprune as gp
    from graphprune.frontends import load_traced
    from graphprune.passes.masks.alps import ALPS
    from graphprune.passes.masks.sparsegpt import SparseGPT
    from graphprune.passes.masks.wanda import Wanda
    from graphprune.quality.perplexity import perplexity
    from graphprune.solvers import Unstructured
    from graphprune.streaming import State

    calibration, evaluation = _windows(settings)
    plain, pruning = Clock(), Clock()
    with (load := Clock()):
        program = load_traced(settings.model)
    solver = {"sparsegpt": SparseGPT, "wanda": Wanda, "alps": ALPS}[method]()
    pattern = Unstructured(settings.sparsity)
    with tempfile.TemporaryDirectory(prefix="graphprune-") as new:
        state = State(Path(new) / "state", every=0)
        with pruning:
            found = gp.sparsify(program, calibration, solver, pattern, state=state)
        peak = _peak()
        _pass(program.module, calibration, plain)
        value = perplexity(found.program.module, evaluation).value
    return Measured(pruning.cpu, pruning.wall, load.cpu, plain.cpu, peak, value)


def _paper(settings: Settings, method: str) -> Measured:
    """Prune with the plain implementation."""
    from _bench_oneshot_plain import prune
    from transformers import AutoModelForCausalLM

    from graphprune.quality.perplexity import perplexity

    calibration, evaluation = _windows(settings)
    plain, pruning = Clock(), Clock()
    with (load := Clock()):
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, trust_remote_code=False
        ).eval()
    with pruning:
        prune(model, calibration, method, settings.sparsity)
    peak = _peak()
    _pass(model, calibration, plain)
    value = perplexity(model, evaluation).value
    return Measured(pruning.cpu, pruning.wall, load.cpu, plain.cpu, peak, value)


def _billion(settings: Settings, method: str) -> Measured:
    """Prune a large model; new weights go to files, group by group."""
    import graphprune as gp
    from graphprune.frontends import load_traced
    from graphprune.passes.masks.sparsegpt import SparseGPT
    from graphprune.passes.masks.wanda import Wanda
    from graphprune.solvers import Unstructured
    from graphprune.streaming import State

    solver = {"sparsegpt": SparseGPT, "wanda": Wanda}[method]()
    generator = torch.Generator().manual_seed(0)
    with (load := Clock()):
        program = load_traced(settings.model)
    size = program.weights["model.embed_tokens.weight"].shape[0]
    tokens = torch.randint(size, (settings.windows, settings.length), generator=generator)
    with tempfile.TemporaryDirectory(prefix="graphprune-", dir=Path(settings.model).parent) as new:
        state = State(Path(new) / "state", every=0)
        with (pruning := Clock()):
            found = gp.sparsify(
                program, tokens, solver, Unstructured(settings.sparsity), state=state
            )
        peak = _peak()
        _write(found.program, Path(new))
        saved = _peak()
    return Measured(pruning.cpu, pruning.wall, load.cpu, peak=peak, saved=saved)


def _write(program: Program, directory: Path) -> None:
    """Write all weights, one by one; unlike `Slim.save`, without trying the written model."""
    from graphprune.checkpoints.memory import page_out
    from graphprune.checkpoints.writing import write_weights

    last: list[Tensor] = []

    def tensor(name: str) -> Tensor:
        if last:
            page_out(last.pop())
        last.append(program.weights[name])
        return last[0]

    names = sorted(program.trainable - program.aliases.keys())
    write_weights(directory, names, tensor)


def _peak() -> int:
    """Bytes of memory that the process has had at most, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_JOBS: Mapping[str, Callable[[Settings, str], Measured]] = {
    "ours": _ours,
    "paper": _paper,
    "billion": _billion,
}


if __name__ == "__main__":
    run_here(sys.argv[1])
