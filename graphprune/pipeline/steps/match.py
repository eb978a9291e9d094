"""The pass ``match``: each block is trained on what the dense block computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from graphprune.calibration.sources.amounts import REPAIRS, Amount
from graphprune.passes.match import BlockStep, Match, Matched, match
from graphprune.passes.match.pairs import pairs_of
from graphprune.passes.protocol import Context, Record, State
from graphprune.pipeline.steps.traced import as_traced
from graphprune.progress import Part
from graphprune.report.trained import Trained
from graphprune.streaming import Step


@dataclass(frozen=True)
class MatchBlocks(Match):
    """Train what earlier passes have left of each residual block; zeros and widths are held.

    Its options are those of `graphprune.passes.match.Match`.
    """

    needs_data: ClassVar[bool] = True

    @property
    def amount(self) -> Amount:
        """How much data it takes."""
        return REPAIRS

    @property
    def passes(self) -> int:
        """How often the data goes through the model; a gradient counts as two more."""
        return 3 + 3 * self.epochs

    def check(self, state: State, context: Context) -> None:
        """See that the model has blocks to be matched.

        Raises:
            PlanError: it has none, or no gradients.
        """
        program = as_traced(state.program, "match")
        pairs_of(program, state.plan.bind(program))

    def run(self, state: State, context: Context) -> State:
        """Train them.

        Raises:
            GraphPruneError: see `graphprune.passes.match.match`.
        """
        samples = context.samples(REPAIRS)
        with context.stage("matching blocks"):
            found = match(
                as_traced(context.dense, "match"),
                as_traced(state.program, "match"),
                samples.data,
                state.plan,
                masks=state.masks,
                options=self,
                progress=_each_block(context.progress),
                state=context.journal(),
            )
        reasons = Counter(found.skipped.values())
        notes = tuple(f"{count} blocks not matched: {why}" for why, count in reasons.items())
        record = Record("match", notes, _details(found, samples.described()))
        return replace(state, program=found.program, unfitted=None).recorded(record)

    def preview(self, state: State, context: Context) -> State:
        """Check what the run would do."""
        self.check(state, context)
        return state.recorded(Record("match"))

    def describe(self, state: State) -> str:
        """One line."""
        program = as_traced(state.program, "match")
        count = len(pairs_of(program, state.plan.bind(program))[0])
        return f"match {count} blocks with the dense model's"


def _details(found: Matched, samples: str) -> Trained | None:
    kept = [block for block in found.blocks if block.stays]
    if not kept:
        return None
    before = sum(block.before for block in found.blocks) / len(found.blocks)
    after = sum(block.error for block in found.blocks) / len(found.blocks)
    parameters = tuple(dict.fromkeys(name for block in kept for name in block.parameters))
    told = (
        f"matched {len(kept)} of {len(found.blocks)} blocks: mean relative error of what they "
        f"compute {before:.4f}, now {after:.4f} (held-out samples)"
    )
    blocks = {b.path: {"before": b.before, "after": b.after, "stays": b.stays}
              for b in found.blocks}  # fmt: skip
    return Trained("match", parameters, told, {"blocks": blocks}, samples)


def _each_block(progress: Callable[[str], None]) -> Callable[[Step], None]:
    def tell(step: Step) -> None:
        left = step.left if isinstance(step, BlockStep) else None
        number, quick = step.group.index + 1, step.restored
        progress(Part("matching blocks", number, step.total, quick=quick, left=left))

    return tell
