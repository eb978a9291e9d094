"""tools/bench analysis: time and memory of planning and applying on Llama-shaped models.

The floor is one `index_select` per weight and dimension to the final sizes. All are timed in
processes that have planned and applied before, and each figure is the best of its turns, so that
what else a machine does at some moment counts for none of them.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _bootstrap import environment

REMOVE = {"hidden": 0.5, "kv_heads": 0.5, "ffn": 0.5}


def main(sizes: list[int], hidden: int, turns: int) -> None:
    """Run processes for each number of layers, so that memory is measured from a clean start."""
    print(f"remove {REMOVE}, magnitude scores, float32, {_threads()} threads, best of {turns}")
    print("layers  params M  trace s  analysis s  floor s  plan s  apply s  ratio  extra memory")
    for layers in sizes:
        command = [sys.executable, str(Path(__file__).with_name("bench")), "analysis", "--one"]
        command += ["--layers", str(layers), "--hidden", str(hidden)]
        found = []
        for _ in range(turns):
            done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        r = {name: min(one[name] for one in found) for name in found[0]}
        r["memory"] = max(one["memory"] for one in found)
        print(
            f"{layers:6d} {r['params'] / 1e6:9.0f} {r['trace']:8.2f} {r['analysis']:11.2f} "
            f"{r['floor']:8.2f} {r['plan']:7.2f} {r['apply']:8.2f} "
            f"{(r['plan'] + r['apply']) / r['floor']:6.2f} {r['memory']:12.1%}",
            flush=True,
        )


def measure(layers: int, hidden: int) -> dict[str, float]:
    """Times in seconds; memory beyond the model as a share of its size."""
    import graphprune as gp
    from graphprune.analysis.structures import find_structures
    from graphprune.ir.torch.infer import infer

    # What a process imports and compiles at its first call would be all that small models show.
    first = gp.trace(*_llama(1, 64))
    gp.apply(first, gp.select(first, remove=REMOVE))
    model, args, kwargs = _llama(layers, hidden)
    program, trace = _timed(lambda: gp.trace(model, args, kwargs))
    _, analysis = _timed(
        lambda: (infer(program.exported, program.aliases), find_structures(program, program.costs))
    )
    plan = gp.select(program, remove=REMOVE)
    floor, plan_time = math.inf, math.inf
    size = program.costs.total().bytes
    for _ in range(3):
        floor = min(floor, _floor(program, plan))
        _, once = _timed(lambda: gp.select(program, remove=REMOVE))
        plan_time = min(plan_time, once)
    gc.collect()
    with _Peak() as peak:
        plan, once = _timed(lambda: gp.select(program, remove=REMOVE))
        _, apply_time = _timed(lambda: gp.apply(program, plan, consume=True))
    return {
        "params": program.costs.total().params,
        "trace": trace,
        "analysis": analysis,
        "floor": floor,
        "plan": min(plan_time, once),
        "apply": apply_time,
        "memory": peak.extra / size,
    }


def _llama(layers: int, hidden: int) -> tuple[Any, tuple[()], dict[str, Any]]:
    """Return a model with random weights and its example inputs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 2),
        vocab_size=8192,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.requires_grad_(False).copy_(torch.rand(p.shape[-1]).expand_as(p))
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.copy_(torch.rand_like(module.inv_freq))
    return model.eval(), (), {"input_ids": torch.zeros(2, 13, dtype=torch.int64)}


def _floor(program: Any, plan: Any) -> float:
    kept = plan.kept(program)
    weights = {n: program.weights[n] for n in program.trainable}
    # The first time pays for fresh memory: the fastest of three is the hardest to compare with.
    return min(_timed(lambda: _select_all(weights, kept))[1] for _ in range(3))


def _select_all(weights: dict[str, Any], kept: dict[str, Any]) -> None:
    import torch

    cut = []
    for name, tensor in weights.items():
        for dim, indices in enumerate(kept[name]):
            tensor = tensor.index_select(dim, torch.from_numpy(indices))
        cut.append(tensor)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


class _Peak:
    """The kernel's own record of resident memory; `extra` is the peak above the start, in bytes."""

    def __enter__(self) -> _Peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.start = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.extra = _status("VmHWM") - self.start


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _threads() -> int:
    import torch

    return torch.get_num_threads()
