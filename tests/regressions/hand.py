"""What the regression tests share: plans told by hand, and tensors cut by hand."""

from __future__ import annotations

import warnings

import torch

import graphprune as gp
from graphprune.analysis.structure import Structure
from graphprune.ir.torch.program import Program


def structures_at(program: Program, parameter: str, dim: int) -> list[Structure]:
    """The prunable structures that lie in a dimension."""
    return [s for s in program.structures if s.prunable and (parameter, dim) in s.members]


def structure_at(program: Program, parameter: str, dim: int, role: str | None = None) -> Structure:
    """The one of them, or the one of a role."""
    found = [s for s in structures_at(program, parameter, dim) if role in (None, s.role)]
    assert len(found) == 1, [s.name for s in found]
    return found[0]


def plan_of(program: Program, *choices: tuple[Structure, list[int]]) -> gp.Plan:
    """A plan that keeps the given units."""
    return gp.Plan(
        program.fingerprint,
        {s.name: tuple(units) for s, units in choices},
        {s.name: s.size for s, _ in choices},
    )


def verified(program: Program, plan: gp.Plan) -> gp.Slim:
    """The slim model; it equals the masked one in float64, and differs from the dense one."""
    slim = gp.apply(program, plan)
    certificate = gp.verify(program, plan, slim, dtype=torch.float64)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 0
    return slim


def kept(program: Program, plan: gp.Plan, parameter: str) -> list[list[int]]:
    """Kept indices of a parameter, dimension by dimension."""
    return [dim.tolist() for dim in plan.kept(program)[parameter]]


def quiet_module(slim: gp.Slim) -> torch.nn.Module:
    """The slim module, in whatever form."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the slim module is the exported graph")
        return slim.module


def gone(size: int, *removed: int) -> list[int]:
    """All indices but the removed ones."""
    return [i for i in range(size) if i not in removed]


def blocks(units: list[int], width: int) -> list[int]:
    """The positions of whole blocks."""
    return [u * width + i for u in units for i in range(width)]
