"""Structures that a score can't judge: they stay whole, and whoever asked is told so."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.passes.shared.score import Score
from graphprune.streaming import find_sites
from graphprune.streaming.consumers import consumers


def unjudged(score: Score, program: BaseProgram) -> dict[str, str]:
    """Prunable structures that a score can't judge, to the reason; see `Score`."""
    ask = getattr(score, "unjudged", None)
    if ask is None:
        return {}
    structures = [*program.structures, *program.sublayers]
    found: dict[str, str] = ask(program, [s for s in structures if s.prunable])
    return found


def unread(program: BaseProgram, structures: Sequence[Structure], score: str) -> dict[str, str]:
    """Those whose units no weight multiplies by, which scores of consumers can't judge.

    Args:
        program: the program.
        structures: some of its own.
        score: the name of the score that asks.
    """
    users = consumers(program, structures, find_sites(program, every=True))
    return {s.name: _reason(s, score) for s in structures if not users[s.name]}


def _reason(structure: Structure, score: str) -> str:
    if structure.blocks:
        return (
            f"score {score} is about what reads the units of an axis, and this is a stack of layers"
        )
    return (
        f"score {score} can't see what its units do: no weight multiplies by them that could be "
        "treated"
    )
