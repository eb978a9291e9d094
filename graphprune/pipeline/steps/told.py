"""What long passes tell of their progress."""

from __future__ import annotations

from collections.abc import Callable

from graphprune.progress import Part
from graphprune.streaming import Step


def each_group(progress: Callable[[str], None], what: str) -> Callable[[Step], None]:
    """Tell of each group of weights: "repairing weights: 3 of 12"."""

    def tell(step: Step) -> None:
        progress(Part(what, step.group.index + 1, step.total, quick=step.restored))

    return tell


class EachMaskedGroup:
    """Tells of groups: in a first pass, if the layer budget needs one, and in that of the masks."""

    def __init__(self, tell: Callable[[str], None], budget: str) -> None:
        self.tell = tell
        self.passes = ["pruning weights"]
        if budget in ("owl", "sensitivity"):
            self.passes.insert(0, "looking for the layers' budgets")
        self.last = -1

    def __call__(self, step: Step) -> None:
        """Tell of a group that is done."""
        if step.group.index <= self.last and len(self.passes) > 1:
            del self.passes[0]
        self.last = step.group.index
        done = ", as before" if step.restored else ""
        rest = f"{done}, {step.group.name}"
        number, stage = step.group.index + 1, self.passes[0]
        self.tell(Part(stage, number, step.total, unit="group", rest=rest, quick=step.restored))
