"""What to say of structures that stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.passes.selection.scope import Scope


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
