"""New numbers for the layers of stacks that lose some."""

from __future__ import annotations

from collections.abc import Mapping

from graphprune.analysis.program import BaseProgram
from graphprune.plan.plan import Selection

Shifts = Mapping[str, Mapping[int, int]]


def shifts_of(program: BaseProgram, selection: Selection) -> dict[str, dict[int, int]]:
    """For every stack that loses layers, the new numbers of those that stay."""
    shifts: dict[str, dict[int, int]] = {}
    for stack, blocks in selection.cuts.items():
        if program.by_name[stack].parent:  # branches leave the layers where they are
            continue
        gone = {b.index for b in blocks}
        size = program.by_name[stack].size
        kept = [i for i in range(size) if i not in gone]
        shifts[stack] = {old: new for new, old in enumerate(kept)}
    return shifts


def shifted(name: str, shifts: Shifts) -> str:
    """`name` of a parameter or module, where layers behind a removed one have moved up."""
    for stack, shift in shifts.items():
        if name.startswith(f"{stack}."):
            number, dot, rest = name[len(stack) + 1 :].partition(".")
            if number.isdigit():
                return f"{stack}.{shift.get(int(number), number)}{dot}{rest}"
    return name
