"""Gates on whole models: with gates at 1, closed at random, and folded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.oracle.masked import run_masked
from graphprune.plan.plan import Plan
from graphprune.training.gates.attach import attach
from graphprune.training.gates.concrete import begun
from graphprune.training.gates.gates import Gated, Gates, folded
from graphprune.training.gates.places import Places, places_of
from graphprune.training.model.adapters import Draw
from graphprune.training.model.held import HeldMasks
from graphprune.training.model.student import student_of
from graphprune.training.model.trainable import Trainable


def structures_of(program: Program, *roles: str) -> list[Structure]:
    """The prunable structures with some roles, or with any but those of branches."""
    found = [s for s in (*program.structures, *program.sublayers) if s.prunable and s.size > 1]
    branches = ("attention_blocks", "mlp_blocks")
    return [s for s in found if (s.role in roles if roles else s.role not in branches)]


def gated_of(structures: Sequence[Structure]) -> list[Gated]:
    """Half of the units of each are to stay."""
    return [
        Gated(
            s,
            1 if s.within is None else s.within.size,
            max(1, s.size // 2, s.minimum),
            np.array([b.index for b in s.blocks] if s.blocks else range(s.size)),
        )
        for s in structures
    ]


def refused(program: Program) -> dict[str, str]:
    """Roles with structures that offer no place, to a reason."""
    found = {}
    for s in structures_of(program) + structures_of(program, "attention_blocks", "mlp_blocks"):
        try:
            places_of(program, [s])
        except PlanError as error:
            found[s.role] = str(error.why)
    return found


@dataclass
class Laid:
    """Gates laid on a model."""

    program: Program
    gates: Gates
    places: Places
    module: Any

    def outputs(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """What the gated model computes of the example."""
        self.gates.fixed = values
        args, kwargs = self.program.example
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _floats(self.module(*args, **kwargs))

    def ones(self) -> dict[str, Tensor]:
        return {n: torch.ones(len(one.free)) for n, one in self.gates.gated.items()}

    def drawn(self, seed: int) -> tuple[Plan, dict[str, Tensor], dict[str, Tensor]]:
        """A plan of units drawn at random, its gates, and gates from .2 to 1 in place of ones."""
        noise = torch.Generator().manual_seed(seed)
        kept, binary, soft = {}, {}, {}
        for name, one in self.gates.gated.items():
            size = one.structure.size
            z = torch.zeros(one.rows, size)
            must = sorted(set(range(size)) - set(one.removable.tolist()))
            rows = []
            for row in range(one.rows):
                order = torch.randperm(len(one.removable), generator=noise).tolist()
                chosen = [int(one.removable[i]) for i in order[: one.count - len(must)]]
                rows.append(tuple(sorted({*must, *chosen})))
                z[row, list(rows[-1])] = 1
            kept[name] = tuple(rows) if one.structure.within is not None else rows[0]
            binary[name] = z.flatten()
            scale = 0.2 + 0.8 * torch.rand(z.numel(), generator=noise)
            soft[name] = binary[name] * torch.where(one.free, scale, 1.0)
        return Plan(self.program.fingerprint, kept), binary, soft

    def folded(self, values: Mapping[str, Tensor]) -> Program:
        """The program with gates multiplied into its weights."""
        weights = {n: self.program.weights[n] for n in self.program.weights}
        open_ = {n: torch.where(z > 0, z, 1.0) for n, z in values.items()}
        for name, own in self.places.by_parameter.items():
            weights[name] = folded(weights[name].detach(), own, open_)
        return replace(self.program, weights=weights)


def lay(program: Program, structures: Sequence[Structure]) -> Laid:
    """Lay gates on a program's graph."""
    places, draw = places_of(program, structures), Draw()
    gates = begun(gated_of(structures), 0, draw, by_score=False)
    student = student_of(replace(program, module=None))
    held = HeldMasks(student.module, {})
    trainable = Trainable(student, {n: n for n in student.names}, (), held, draw)
    attach(trainable, gates, places, program)
    return Laid(program, gates, places, student.module)


def masked(program: Program, plan: Plan) -> list[Tensor]:
    """What the graph computes without some units; no gate takes part in it."""
    found = run_masked(program, plan.bind(program), program.example)
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def difference(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest one, relative to the largest value."""
    pairs = list(zip(found, right, strict=True))
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _floats(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
