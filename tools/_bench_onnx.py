"""tools/bench onnx: dense against slim in ONNX Runtime, and where the time goes.

Both models run in turns in one process on one thread. Share of the ideal speed-up: the ratio of
their median times divided by the ratio of their multiply-accumulates (MACs).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _bench_models as models
import onnxruntime
import torch

import graphprune as gp
from graphprune.frontends.onnx.load import load_onnx
from graphprune.passes.selection.select import select
from graphprune.quality.timing import Speedup, in_words

PLAN_BAR = 1.5  # seconds to plan and apply
PROFILED = 15  # runs
SHOWN = 8  # operators


@dataclass(frozen=True)
class Case:
    """A model to prune and measure.

    Attributes:
        title: the model and its inputs.
        build: writes the dense file, returns example inputs.
        remove: fraction by role.
        bar: share of the ideal speed-up to reach.
    """

    title: str
    build: Callable[[Path], dict[str, torch.Tensor]]
    remove: dict[str, float]
    bar: float


HALF = {"ffn": 0.5, "heads": 0.5}
CASES = {
    "minilm": Case("MiniLM, batch 8, 128 tokens", models.minilm, HALF, 0.85),
    "minilm-torchscript": Case(
        "the same by the older exporter", partial(models.minilm, dynamo=False), HALF, 0.85
    ),
    "resnet50": Case("ResNet-50, one image of 224 x 224", models.resnet50, {"channels": 0.5}, 0.80),
}


def main(names: list[str], repeats: int, align: int) -> int:
    """Measure cases and print what is found; 0 where every bar is reached, 1 otherwise."""
    torch.set_num_threads(1)
    print(f"ONNX Runtime {onnxruntime.__version__}, 1 thread, {repeats} turns, aligned to {align}")
    print(f"a product of 1024 x 1024 matrices in PyTorch: {_peak():.0f} GMAC/s")
    reached = True
    for name in names or list(CASES):
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            reached &= measure(CASES[name], Path(folder), repeats, align)
    return 0 if reached else 1


def measure(case: Case, folder: Path, repeats: int, align: int) -> bool:
    """Prune one model, time both, print; whether the bars are reached."""
    files = [folder / "dense.onnx", folder / "slim.onnx"]
    inputs = case.build(files[0])
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        program = load_onnx(files[0], {name: tuple(t.shape) for name, t in inputs.items()})
    with _timed(seconds, "plan"):
        plan = select(program, remove=case.remove, align=align)
    with _timed(seconds, "apply"):
        slim = gp.apply(program, plan)
        slim.save(files[1])
    gp.verify(program, plan, files[1]).raise_if_failed()
    call = program.traced_workload()
    macs = [program.costs_at(call).total().macs, slim.cost_at(call).macs]
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    print(f"\n{case.title}: {case.remove} removed")
    planned = _show_stages(seconds)
    wall, cpu = _in_turns([_session(file) for file in files], feeds, repeats)
    share = _show_times(case, macs, wall, cpu)
    _show_operators(_profiles(files, feeds, folder), macs)
    return planned and share >= case.bar


def _show_stages(seconds: dict[str, float]) -> bool:
    """Print the time of each stage; whether planning and applying are fast enough."""
    took = seconds["plan"] + seconds["apply"]
    stages = ", ".join(f"{stage} {t:.2f} s" for stage, t in seconds.items())
    verdict = _verdict(took < PLAN_BAR, f"< {PLAN_BAR} s")
    print(f"  {stages} (with writing and checking); plan and apply {took:.2f} s,", verdict)
    return took < PLAN_BAR


def _show_times(
    case: Case, macs: list[int], wall: list[list[float]], cpu: list[list[float]]
) -> float:
    """Print how long calls took; the share of the ideal speed-up."""
    print("  call, ms  GMACs     least  quartile    median  quartile  processor's median")
    for name, count, taken, used in zip(("dense", "slim"), macs, wall, cpu, strict=True):
        first, median, third = statistics.quantiles(taken, n=4, method="inclusive")
        row = (min(taken), first, median, third, statistics.median(used))
        print(f"  {name:8}{count / 1e9:7.2f}" + "".join(f"{1e3 * t:10.1f}" for t in row))
    ideal = macs[0] / macs[1]
    ratios = [statistics.median(t[0]) / statistics.median(t[1]) for t in (wall, cpu)]
    share = ratios[0] / ideal
    print(f"  {in_words(Speedup(ratios[0], ideal, share))}:", end=" ")
    print(
        f"{share:.0%} of the ideal speed-up ({ratios[1] / ideal:.0%} by processor time),", end=" "
    )
    print(_verdict(share >= case.bar, f">= {case.bar:.0%}"))
    return share


def _show_operators(profiles: list[dict[str, float]], macs: list[int]) -> None:
    """Print which operators keep the slim model from the ideal speed-up, or push it beyond."""
    dense, slim = profiles
    ideal = macs[0] / macs[1]
    print(f"  {'operator, ms':24}{'dense':>9}{'slim':>9}{'ideal':>9}{'short by':>10}")
    for op in sorted(dense | slim, key=lambda op: -max(dense.get(op, 0), slim.get(op, 0)))[:SHOWN]:
        a, b = 1e3 * dense.get(op, 0), 1e3 * slim.get(op, 0)
        print(f"  {op:24}{a:9.2f}{b:9.2f}{a / ideal:9.2f}{b - a / ideal:10.2f}")
    for name, profile, count in zip(("dense", "slim"), profiles, macs, strict=True):
        busy = sum(t for op, t in profile.items() if op in _WITH_MACS)
        idle = 1 - busy / sum(profile.values())
        print(f"  {name}: {idle:.1%} of the time in operators without MACs,", end=" ")
        print(f"the others at {count / busy / 1e9:.0f} GMAC/s")


# What ONNX Runtime's optimiser leaves of products and convolutions.
_WITH_MACS = {
    "Attention", "Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul",
    "MultiHeadAttention",
}  # fmt: skip


def _profiles(files: list[Path], feeds: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """Seconds of a call by type of operator: sums of each one's fastest, taken in turns."""
    sessions = [_session(file, folder / file.stem) for file in files]
    for _ in range(PROFILED):
        for session in sessions:
            session.run(None, feeds)
    found = []
    for session in sessions:
        events = json.loads(Path(session.end_profiling()).read_text())
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e6)
        total: dict[str, float] = defaultdict(float)
        for (op, _), taken in times.items():
            total[op] += min(taken)
        found.append(dict(total))
    return found


def _session(file: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _in_turns(
    sessions: list[onnxruntime.InferenceSession], feeds: dict[str, Any], repeats: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds by the clock and on the processor, by session."""
    wall: list[list[float]] = [[] for _ in sessions]
    cpu: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        for _ in range(2):
            session.run(None, feeds)
    for _ in range(repeats):
        for i, session in enumerate(sessions):
            start, used = time.perf_counter(), time.process_time()
            session.run(None, feeds)
            wall[i].append(time.perf_counter() - start)
            cpu[i].append(time.process_time() - used)
    return wall, cpu


def _peak() -> float:
    """Billions of multiply-accumulates a second of a product that fits the caches well."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    taken = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - start)
    return 1024**3 / min(taken) / 1e9


class _timed:
    """Takes the time of a block."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = time.perf_counter() - self.start


def _verdict(reached: bool, bar: str) -> str:
    return f"bar {bar}: {'reached' if reached else 'MISSED'}"
