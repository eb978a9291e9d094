"""Block matching: what is left of a block is trained on what the dense block computes."""

from graphprune.passes.match.options import Match
from graphprune.passes.match.result import BlockStep, Matched, MatchedBlock
from graphprune.passes.match.run import match
from graphprune.passes.match.zeros import masks_of

__all__ = ["BlockStep", "Match", "Matched", "MatchedBlock", "masks_of", "match"]
