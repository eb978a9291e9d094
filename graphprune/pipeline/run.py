"""One compilation while it goes on: what its passes may use, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.calibrate import calibration_samples
from graphprune.calibration.dense import check_dense
from graphprune.calibration.result import Samples
from graphprune.calibration.sources.amounts import REPAIRS, SCORES, TRAINING, WEIGHTS, Amount
from graphprune.errors import CalibrationError
from graphprune.oracle.verification import Certificate
from graphprune.passes.turn import Round
from graphprune.pipeline.checking import prove
from graphprune.pipeline.resume import Journal
from graphprune.plan.plan import Plan
from graphprune.provenance.making import Making
from graphprune.ranks.group import current
from graphprune.recipe.recipe import Recipe
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.streaming import State as Progress

_PURPOSES = {SCORES: "scores", REPAIRS: "refits", WEIGHTS: "masks", TRAINING: "training"}
"""What data is for, as the report and the recipe that is written call it."""


@dataclass
class Run:
    """One compilation; the `graphprune.passes.protocol.Context` of each of its passes.

    Attributes:
        dense: the program as it was read.
        recipe: what to do, with nothing left open.
        progress: told of each stage.
        making: what it was told, and what it has read.
        open: what was left to us: "score", "repair", "training".
        given: whether the data was not left to us.
        dry: whether nothing is to be written.
        saved: where its progress is; None where nothing is saved.
        round: the turn of the present pass.
        label: what the present pass is called in the journal.
        ahead: the names of the passes that come after it.
        form: whether a plain Hugging Face config can hold the plan, None if nobody asked, and what
            there is to say of it.
        seconds: time taken by the stages that are over.
        notes: for the report.
        unfit: why the dense model makes no sense of the data, if it doesn't.
    """

    dense: BaseProgram
    recipe: Recipe
    progress: Callable[[str], None]
    making: Making = field(default_factory=Making)
    open: frozenset[str] = frozenset()
    given: bool = False
    dry: bool = False
    saved: Journal | None = None
    round: Round = field(default_factory=Round)
    label: str = ""
    ahead: tuple[str, ...] = ()
    form: tuple[bool | None, tuple[str, ...]] = (None, ())
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unfit: CalibrationError | None = None
    _samples: dict[Amount, Samples] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.recipe.seed

    @property
    def trust(self) -> bool:
        """Whether a model on disk may run code of its own."""
        return bool(self.making.opening.get("trust"))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        self.progress(name)
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + took, 3)

    def note(self, *notes: str) -> None:
        """Keep what there is to say, once."""
        self.notes = tuple(dict.fromkeys((*self.notes, *notes)))

    def samples(self, amount: Amount) -> Samples:
        """The calibration data; see `graphprune.passes.protocol.Context`."""
        if amount not in self._samples:
            with self.stage("reading calibration data"):
                found = self._read(amount)
            if amount is not SCORES and not found.own:
                self._check_dense(found)
            self.note(*found.notes)
            self._samples[amount] = replace(found, notes=())
        purpose = _PURPOSES.get(amount, self.label)
        if purpose not in self.making.used:
            self.making.use(purpose, self._samples[amount])
        return self._samples[amount]

    def _read(self, amount: Amount) -> Samples:
        def read() -> Samples:
            wanted = self.recipe.calibration
            return calibration_samples(self.dense, wanted, self.seed, amount, self.progress)

        # Data to train on may be more than memory holds: each process maps it.
        return read() if amount is TRAINING else current().first(read)

    def _check_dense(self, found: Samples) -> None:
        with self.stage("checking the dense model"):
            try:
                current().first(lambda: check_dense(self.dense, found.judging))
            except CalibrationError as error:
                self.unfit = error
                raise

    def prove(self, program: BaseProgram, plan: Plan, slim: Slim | SlimOnnx) -> Certificate:
        """Compare a slim model with the masked one; see `graphprune.passes.protocol.Context`."""
        wanted = self.recipe.verify
        with self.stage("verifying"):
            return current().first(lambda: prove(program, plan, slim, wanted, self.seed))

    def journal(self) -> Progress | None:
        """Where the present pass saves its progress."""
        return self.saved.state(self.label) if self.saved is not None else None
