"""How many units a slim model keeps, by role and by structure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphprune.report.names import layer_of

if TYPE_CHECKING:  # reports are read where torch isn't wanted
    from graphprune.rewrite.slim import Slim
    from graphprune.rewrite.slim_onnx import SlimOnnx


@dataclass(frozen=True)
class Kept:
    """A structure that loses units.

    Attributes:
        name: its own.
        role: its role; "" without one.
        layer: the number of the layer that it stands in; "" outside of layers.
        size: units in the dense model.
        count: units that stay, in each outer unit where the structure is ragged.
    """

    name: str
    role: str
    layer: str
    size: int
    count: int


def kept_units(slim: Slim | SlimOnnx) -> dict[str, tuple[int, int]]:
    """Units kept and units there were, of every role that loses some."""
    from graphprune.passes.selection.coupled import units_of

    program, units = slim.program, slim.plan.kept_units
    gone = slim.selection.removed_parameters
    structures = [s for s in program.by_name.values() if s.prunable]
    sizes, left = {s.name: s.size for s in structures}, {}
    for s in structures:
        stays = s.blocks or not gone.issuperset(name for name, _ in s.members)
        rows = units.get(s.name, range(s.size))
        left[s.name] = (len(rows[0]) if isinstance(rows[0], tuple) else len(rows)) if stays else 0
    total: dict[str, int] = defaultdict(int)
    kept: dict[str, int] = defaultdict(int)
    for name, (before, after) in units_of(program, structures, sizes, left).items():
        role = program.by_name[name].role or "other"
        total[role] += before
        kept[role] += after
    named = {program.by_name[name].role or "other" for name in units}
    return {role: (kept[role], total[role]) for role in total if role in named}


def kept_structures(slim: Slim | SlimOnnx) -> tuple[Kept, ...]:
    """Every structure that loses units, in the order of the plan."""
    from graphprune.plan.kept import rows_of

    program = slim.program
    return tuple(
        Kept(name, program.by_name[name].role, "" if program.by_name[name].blocks
             else layer_of(name), program.by_name[name].size, len(rows_of(units)[0]))
        for name, units in slim.plan.kept_units.items()
    )  # fmt: skip
