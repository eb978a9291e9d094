"""Index types: the axis that the values of an integer tensor point into.

A slim model numbers the places of a pruned axis anew. An integer tensor whose values are such
places is right in a slim model as long as it comes from an operator over the same axis (top-k,
argmax, arange) and is used for nothing but looking up, writing or comparing places. Any other use
takes its values as numbers, which pruning would change, and freezes the axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.axes import Expr, Reason, freeze


@dataclass(eq=False, slots=True)
class Points:
    """What the values of an integer tensor point into.

    Attributes:
        axis: its places are the values.
        counted: whether the values are 0, 1, 2, … along `axis` itself. These may be taken either
            as places, which a slim model counts anew, or as numbers, of which it has those that
            stay; but not as both.
        stored: whether the values are stored in the model, which numbers them anew when it is cut.
        places: whether the values are used as places anywhere.
        numbers: whether they are used as numbers anywhere.
    """

    axis: Expr
    counted: bool = False
    stored: bool = False
    places: bool = False
    numbers: bool = False

    def as_places(self, reason: Reason) -> None:
        """Note that an operator looks something up at these places."""
        self.places = True
        if self.numbers:
            freeze(self.axis, reason)

    def as_numbers(self, reason: Reason) -> None:
        """Note that an operator computes with the values."""
        self.numbers = True
        if self.places or not self.counted:
            freeze(self.axis, reason)
