"""What processes that share a run do in tests, and what one process does alone."""

from __future__ import annotations

import os
import signal
from fnmatch import fnmatch
from functools import partial

import torch
from safetensors.torch import save_file

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.passes.masks import DSnoT, SparseGPT, Wanda
from graphprune.passes.masks.allocations import OWL, Sensitivity
from graphprune.passes.repair.structured import obs, reconstruct
from graphprune.passes.scores import get_score
from graphprune.passes.shared.score import Inputs
from graphprune.ranks.group import RanksError
from graphprune.ranks.launch import together
from graphprune.solvers import Unstructured
from graphprune.streaming import State, text_windows
from ranks.nets import layer, llama, mixtral, ragged, windows

HALF = Unstructured(0.5)
LAYERS = 30
"""Of the real model."""


def shared(folder, jobs):
    """Do the jobs of some names with the other processes, and keep what this one has found."""
    with together() as ranks:
        for name in jobs:
            save_file(JOBS[name](), folder / f"{name}-{ranks.rank}.safetensors")


def one_dies(folder, state, at):
    """Prune; the second process is gone after a group, and the first one says so."""

    def told(step):
        if ranks.rank == 1 and step.group.index == at:
            os.kill(os.getpid(), signal.SIGKILL)

    with together() as ranks:
        try:
            masks(llama(), windows(7), SparseGPT(), state=State(state), progress=told)
        except RanksError as error:
            (folder / "said").write_text(str(error))


def goes_on(folder, state):
    """Prune, from where another run has stopped."""
    with together() as ranks:
        saved = State(state, resume=True)
        found = masks(llama(), windows(7), SparseGPT(), state=saved)
        save_file(found, folder / f"sparsegpt-{ranks.rank}.safetensors")


def refuses(folder, samples):
    """Prune with samples of which one is no number; keep what is said."""
    with together() as ranks:
        try:
            masks(layer(), samples, SparseGPT())
        except PlanError as error:
            (folder / f"{ranks.rank}.txt").write_text(str(error))


def smollm2(folder, model):
    """Masks, units and refits of a real model."""
    with together() as ranks:
        for name, found in real(model).items():
            save_file(found, folder / f"{name}-{ranks.rank}.safetensors")


def real(model):
    """What is found of the first layers of a real model, with a few short windows."""
    program = gp.load(model)
    data = text_windows(program, count=6, length=128)
    layers = [f"model.layers.{n}.*" for n in range(LAYERS)]
    keep = {
        s.name: s.size * 3 // 4
        for s in program.structures
        if s.role == "ffn" and any(fnmatch(s.name, glob) for glob in layers)
    }
    return {
        "masks": masks(program, data, SparseGPT(), include=layers),
        "units": units(program, data, keep),
    }


def masks(program, samples, solver, **options):
    """Prune single weights: new weights, and numbers of the report."""
    found = gp.sparsify(program, samples, solver, HALF, **options)
    weights = {e.parameter: found.program.weights[e.parameter] for e in found.layers}
    numbers = [[e.removed, e.error or 0, e.zeros, e.target] for e in found.layers]
    return {**copied(weights), "report": torch.tensor(numbers, dtype=torch.float64)}


def ffn(program, samples):
    """Keep three quarters of what lies between the layers of feed-forward blocks."""
    keep = {s.name: s.size * 3 // 4 for s in program.structures if s.role == "ffn"}
    return units(program, samples, keep)


def units(program, samples, keep):
    """Choose units by surgery, and refit what reads them for that plan."""
    chosen = obs(program, samples, keep)
    fitted = reconstruct(program, samples, chosen.plan)
    plan = {f"plan {n}": torch.tensor(u) for n, u in chosen.plan.kept_units.items()}
    changed = {f"obs {e.parameter}": chosen.program.weights[e.parameter] for e in chosen.layers}
    changed |= {e.parameter: fitted.program.weights[e.parameter] for e in fitted.layers}
    return {**plan, **copied(changed)}


def scores(program, samples, name, role):
    """Score the units of a role."""
    asked = [s for s in program.structures if s.role == role and s.prunable]
    assert asked
    found = get_score(name).score(program, asked, Inputs(calibration=samples))
    return {s: torch.from_numpy(values).contiguous() for s, values in found.items()}


def scored(name, role, count):
    return scores(llama(), windows(count), name, role)


def copied(weights):
    return {name: w.detach().clone().contiguous() for name, w in weights.items()}


JOBS = {
    "sparsegpt": lambda: masks(llama(), windows(7), SparseGPT()),
    "one window": lambda: masks(llama(), windows(1), SparseGPT()),
    "ragged": lambda: masks(llama(), ragged(), SparseGPT()),
    "reference": lambda: masks(llama(), windows(40), SparseGPT(), reference=True),
    "experts": lambda: masks(mixtral(), windows(3, 2), SparseGPT()),
    "swaps": lambda: masks(mixtral(), windows(3, 5), DSnoT()),
    "errors": lambda: masks(llama(), windows(5), Wanda(), errors=True, keep_zeros=True),
    "owl": lambda: masks(llama(), windows(5), Wanda(), budget=OWL()),
    "sensitivity": lambda: masks(llama(), windows(5), Wanda(), budget=Sensitivity()),
    "units": lambda: ffn(llama(), windows(40)),
    "units of experts": lambda: ffn(mixtral(), windows(30)),
    **{
        name: partial(scored, name, "ffn", 5)
        for name in ("taylor", "element2", "element-mix", "flap", "minitron", "wanda-sp", "obs")
    },
    **{
        name: partial(scored, name, "layers", 9)
        for name in ("block-influence", "span-influence", "loss-greedy")
    },
    "reap": lambda: scores(mixtral(), windows(9), "reap", "experts"),
}
