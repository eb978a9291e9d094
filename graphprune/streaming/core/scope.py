"""Routers, which are left alone whatever the format of the graph."""

from __future__ import annotations

from graphprune.analysis.program import BaseProgram

_EXPERTS = ("experts", "expert_groups")


def routers(program: BaseProgram) -> set[str]:
    """Matrices whose results are as many as there are experts in some stack of them."""
    return {
        name
        for s in program.structures
        if s.role in _EXPERTS
        for name, _ in s.members
        if len(program.parameters[name]) == 2
    }
