"""What processes that share a run do in tests, and what one process does alone."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

import graphprune as gp
from graphprune.passes.masks import DSnoT, Magnitude, SparseGPT, Wanda
from graphprune.passes.masks.allocations import OWL, Sensitivity
from graphprune.passes.repair.structured import obs, reconstruct
from graphprune.passes.scores import get_score
from graphprune.passes.shared.score import Inputs
from graphprune.ranks.launch import together
from graphprune.solvers import Unstructured
from ranks.nets import llama, mixtral, ragged, windows

PROGRAMS = {"llama": llama, "mixtral": mixtral}
METHODS = {"sparsegpt": SparseGPT, "wanda": Wanda, "magnitude": Magnitude, "dsnot": DSnoT}
BUDGETS = {"uniform": "uniform", "owl": OWL(), "sensitivity": Sensitivity()}
SAMPLES = {"windows": windows, "ragged": lambda count: ragged()[:count]}


def shared(folder, work, *args):
    """Do some work with the other processes, and keep what this one has found."""
    with together() as ranks:
        save_file(work(*args), folder / f"{ranks.rank}.safetensors")


def masks(model, samples, count, method="sparsegpt", budget="uniform", **options):
    """Prune single weights: new weights, and numbers of the report."""
    program = PROGRAMS[model]()
    data = SAMPLES[samples](count)
    solver = METHODS[method]()
    found = gp.sparsify(program, data, solver, Unstructured(0.5), budget=BUDGETS[budget], **options)
    weights = {e.parameter: found.program.weights[e.parameter] for e in found.layers}
    numbers = [[e.removed, e.error or 0, e.zeros, e.target] for e in found.layers]
    return {**copied(weights), "report": torch.tensor(numbers, dtype=torch.float64)}


def units(model, samples, count, keep, reference=True):
    """Choose units by surgery, then refit what reads them: weights, and the plan."""
    program = PROGRAMS[model]()
    data = SAMPLES[samples](count)
    chosen = obs(program, data, keep)
    fitted = reconstruct(program, data, chosen.plan, reference=reference)
    plan = {f"plan.{n}": torch.tensor(u) for n, u in chosen.plan.kept_units.items()}
    changed = {f"obs.{e.parameter}": chosen.program.weights[e.parameter] for e in chosen.layers}
    changed |= {e.parameter: fitted.program.weights[e.parameter] for e in fitted.layers}
    return {**plan, **copied(changed)}


def scores(model, count, name, role):
    """Score the units of a role."""
    program = PROGRAMS[model]()
    asked = [s for s in program.structures if s.role == role]
    found = get_score(name).score(program, asked, Inputs(calibration=windows(count)))
    return {s: torch.from_numpy(values).contiguous() for s, values in found.items()}


def copied(weights):
    return {name: w.detach().clone().contiguous() for name, w in weights.items()}
