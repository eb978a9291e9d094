"""Structures that a score can't judge: they stay whole, and whoever asked is told so."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.passes.scope import Scope
from graphprune.passes.score import Score
from graphprune.program import BaseProgram, Structure


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
        program: it.
        structures: some of its own.
        score: the name of the score that asks.
    """
    from graphprune.consumers import consumers
    from graphprune.streaming import find_sites

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


def kept_whole(scope: Scope, roles: set[str]) -> str | None:
    """What to say of structures that stay whole where others of some roles lose units.

    Args:
        scope: what may be touched.
        roles: those of the structures that lose units.
    """
    program, everything = scope.program, scope.judging_all()
    named: dict[str, list[str]] = {}
    for name, why in scope.whole.items():
        structure = program.by_name[name]
        if structure.role in roles and len(everything.candidate(structure).removable):
            named.setdefault(why, []).append(name)
    return "; ".join(f"{_listed(names)}: {why}" for why, names in named.items()) or None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'stay' if len(names) > 1 else 'stays'} whole"
