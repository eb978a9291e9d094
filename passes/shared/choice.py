"""Scores that choose sets of units, where the best set isn't made of the best units."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.axes.expr import IntArray
from graphprune.passes.shared.score import Inputs
from graphprune.plan.kept import Units


class Choice(Protocol):
    """Says which units of one structure stay; `graphprune.passes.selection.rank.Ranked` is one."""

    def kept(self, count: int) -> Units:
        """The units that stay when `count` do, ascending.

        Raises:
            PlanError: no such set can stay; the message says which counts can.
        """


@runtime_checkable
class Chooser(Protocol):
    """A score that chooses sets. Its ranking serves where structures are compared."""

    def choose(
        self, program: BaseProgram, structure: Structure, removable: IntArray, inputs: Inputs
    ) -> Choice | None:
        """What of a structure is to stay.

        Args:
            program: the program.
            structure: one of those that the score is asked about.
            removable: the units that may go, ascending.
            inputs: as for `graphprune.passes.shared.score.Score.score`.

        Returns:
            None to leave it to the ranking.
        """
