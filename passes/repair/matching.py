"""The repair ``match``: what is left of each block is trained on what the dense block computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from graphprune.analysis.program import BaseProgram
from graphprune.errors import PlanError, RecipeError
from graphprune.ir.torch.program import Program, is_traced
from graphprune.passes.match import Match, Matched, match
from graphprune.passes.match.pairs import pairs_of
from graphprune.passes.repair.reconstruction import Reconstruction
from graphprune.passes.repair.refitted import Refitted
from graphprune.passes.repair.structured import Repaired, read_by
from graphprune.plan.plan import Plan
from graphprune.streaming import State, Step


@dataclass(frozen=True)
class Matching(Match):
    """Train blocks by gradients; see `graphprune.passes.match`.

    Attributes:
        first: "reconstruct" fits what reads the pruned axes in closed form before, "none" begins
            with the weights as they were cut.
    """

    needs_data: ClassVar[bool] = True
    first: Literal["reconstruct", "none"] = "reconstruct"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first not in ("reconstruct", "none"):
            raise RecipeError("match begins with reconstruct or none", why=f"{self.first!r}")

    @property
    def passes(self) -> int:
        """How often the data goes through the model; a gradient counts as two more."""
        fits = Reconstruction.passes if self.first == "reconstruct" else 0
        return fits + 3 + 3 * self.epochs

    def check(self, program: BaseProgram, plan: Plan) -> None:
        """See that the model has blocks to be matched.

        Raises:
            PlanError: it has none.
        """
        pairs_of(_traced(program), plan.bind(program))

    def repair(
        self,
        program: BaseProgram,
        samples: Any,
        plan: Plan,
        *,
        progress: Callable[[Step], None] | None = None,
        state: State | None = None,
    ) -> Repaired:
        """Train the blocks that a plan leaves; see `graphprune.passes.repair.protocol.Repair`."""
        self.check(program, plan)
        dense = _traced(program)
        begun = Repaired(dense, plan, (), {})
        if self.first == "reconstruct" and _can_be_refitted(dense, plan):
            saved = None
            if state is not None:
                place = state.directory
                saved = replace(state, directory=place.with_name(f"{place.name}-reconstruct"))
            begun = Reconstruction().repair(dense, samples, plan, progress=progress, state=saved)
        found = match(
            dense,
            _traced(begun.program),
            samples,
            begun.plan,
            options=self,
            progress=progress,
            state=state,
        )
        return Repaired(found.program, begun.plan, _layers(begun, found), begun.untouched)


def _traced(program: BaseProgram) -> Program:
    if is_traced(program):
        return program
    raise PlanError(
        "blocks are matched by gradients, which an ONNX graph doesn't have",
        hint="match the PyTorch model and export what comes of it, or repair by reconstruct",
    )


def _can_be_refitted(program: Program, plan: Plan) -> bool:
    """Whether anything reads what goes, or stays of layers."""
    layers = any(program.by_name[name].blocks for name in plan.kept_units)
    return layers or bool(read_by(program, plan))


def _layers(begun: Repaired, found: Matched) -> tuple[Refitted, ...]:
    """One entry for each changed parameter, with the error of its block where that was trained."""
    before = {e.parameter: e for e in begun.layers}
    entries = dict(before)
    for block in found.blocks:
        for name in block.parameters if block.stays else ():
            removed = before[name].removed if name in before else 0
            note = f"trained with {block.path}, whose errors these are"
            entries[name] = Refitted(name, removed, block.before, block.after, None, (note,))
    trained = {n for b in found.blocks if b.stays for n in b.parameters}
    # A bias that was fitted with a weight has an entry of its own once it is trained.
    return tuple(replace(e, bias=None) if e.bias in trained else e for e in entries.values())
