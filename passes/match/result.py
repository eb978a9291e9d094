"""What became of the blocks that were matched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphprune.ir.torch.program import Program
from graphprune.streaming import Step


@dataclass(frozen=True)
class MatchedBlock:
    """What became of one block.

    Attributes:
        path: of the block, "model.layers.3".
        parameters: what was trained, by the names of the dense model.
        before: error of the block's result on the held-out samples: the mean, over their tokens,
            of the squared distance to the dense stream in units of its square (`weigh: token`).
        after: the same with what was learnt.
        stays: whether it is in the model: it made the error smaller.
    """

    path: str
    parameters: tuple[str, ...]
    before: float
    after: float
    stays: bool

    @property
    def error(self) -> float:
        """The error of what is in the model."""
        return self.after if self.stays else self.before


@dataclass(frozen=True)
class Matched:
    """A program with trained blocks.

    Attributes:
        program: at full size; what a plan removes is as it was.
        blocks: one entry for each block that was trained, in the order of training.
        skipped: path of every other block of a stack to the reason why it wasn't.
    """

    program: Program
    blocks: tuple[MatchedBlock, ...]
    skipped: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BlockStep(Step):
    """What a progress callback is told when a block is done.

    Attributes:
        block: what became of it.
        left: seconds that the blocks after it should take; None where nobody can tell yet.
    """

    block: MatchedBlock | None = None
    left: float | None = None
