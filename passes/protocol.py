"""What a pass is: a step of a compilation, from one immutable state to the next.

A compilation is a list of passes between reading and writing. Scores, mask methods and repairs have
protocols of their own, and passes that run them; whatever is none of these is a pass itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.result import Samples
from graphprune.calibration.sources.amounts import Amount
from graphprune.oracle.verification import Certificate
from graphprune.passes.turn import Round
from graphprune.plan.plan import Plan
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.streaming import State as Progress


@dataclass(frozen=True)
class Record:
    """What a pass did, for the report.

    Attributes:
        name: of the pass.
        notes: what there is to say.
        details: a dataclass with what it found, which the report has as JSON; None for nothing.
    """

    name: str
    notes: tuple[str, ...] = ()
    details: Any = None


@dataclass(frozen=True)
class State:
    """What passes take and give back; none of it is ever changed in place.

    Attributes:
        program: the dense graph, at full size, with its present weights.
        plan: which units stay, in the numbering of the dense graph.
        masks: parameter to a bool tensor of its shape, True where a weight stays: what is False
            is zero, and has to stay zero. Weights without an entry are free.
        records: what each pass did.
        unfitted: the program before refits have made up for what the plan removes, from which the
            next refit begins; None where it is `program`.
    """

    program: BaseProgram
    plan: Plan
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    unfitted: BaseProgram | None = None

    @property
    def base(self) -> BaseProgram:
        """The program that a refit begins with, and whose results it is fitted to."""
        return self.program if self.unfitted is None else self.unfitted

    @classmethod
    def of(cls, program: BaseProgram) -> State:
        """The state that a compilation begins with."""
        return cls(program, Plan(program.fingerprint, {}))

    def recorded(self, record: Record) -> State:
        """The state with one record more."""
        return replace(self, records=(*self.records, record))


class Context(Protocol):
    """What a pass may use besides its state."""

    @property
    def dense(self) -> BaseProgram:
        """The program as it was read."""

    @property
    def seed(self) -> int:
        """Of everything random."""

    @property
    def round(self) -> Round:
        """The turn that the pass is of."""

    @property
    def trust(self) -> bool:
        """Whether a model on disk may run code of its own: the source, and any other one."""

    @property
    def open(self) -> frozenset[str]:
        """What was left to us: "score", "repair", "training".

        What we have chosen is passed over where it can't do something; what somebody has asked for
        is refused then.
        """

    @property
    def ahead(self) -> tuple[str, ...]:
        """The names of the passes that come after this one."""

    @property
    def progress(self) -> Callable[[str], None]:
        """Told of each stage, and of each step of a long one."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Announce a stage, and take its time for the report."""

    def samples(self, amount: Amount) -> Samples:
        """The calibration data, read once.

        Args:
            amount: how much there is of what the recipe leaves open.

        Raises:
            GraphPruneError: it can't be read, or the dense model makes no sense of it.
        """

    def prove(self, program: BaseProgram, plan: Plan, slim: Slim | SlimOnnx) -> Certificate:
        """Compare a slim model with the masked one, as the recipe says.

        Raises:
            VerifyError: they differ.
        """

    def journal(self) -> Progress | None:
        """Where the pass saves its progress, and goes on from; None where nothing is saved."""


class Pass(Protocol):
    """A step of a compilation.

    A pass of another package is a frozen dataclass whose fields are its options. One that looks at
    no calibration data says so by an attribute ``needs_data`` that is false.

    A pass that changes weights saves what it has done in `Context.journal`, and does it again from
    there in a run that goes on; a plan is saved by whoever runs the passes.
    """

    def check(self, state: State, context: Context) -> None:
        """Refuse what can't work, before data is read and anything is computed.

        Raises:
            GraphPruneError: it can't.
        """

    def run(self, state: State, context: Context) -> State:
        """Do it.

        Raises:
            GraphPruneError: it can't be done.
        """

    def preview(self, state: State, context: Context) -> State:
        """What a dry run does instead: find the plan, and leave the weights alone."""

    def describe(self, state: State) -> str:
        """One line on what it does to a model of the plan that a preview found."""
