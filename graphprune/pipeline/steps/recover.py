"""The pass ``recover``: the weights that are left are trained, with their zeros held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from graphprune.calibration.sources.amounts import TRAINING, Amount
from graphprune.errors import LoadError, PlanError
from graphprune.files.paths import usable
from graphprune.frontends import load_traced
from graphprune.frontends.hf.load import checkpoint_class
from graphprune.ir.torch.program import Program
from graphprune.passes.protocol import Context, Record, State
from graphprune.pipeline.steps.numbering import kept_part, slim_names, written_back
from graphprune.pipeline.steps.traced import as_traced
from graphprune.progress import Part
from graphprune.report.trained import Trained
from graphprune.rewrite.apply import apply
from graphprune.rewrite.retrace import retrace
from graphprune.training import Progress, Recovered, Saving, Training, recover
from graphprune.training.core.options import Kind
from graphprune.training.domains.options import Domains
from graphprune.training.mixed import check_domains, domains_of, figures_of, notes_of

TUNED = "tuned"
"""The dense model as a teacher, trained on the same text before."""

_MANY = 0.05
"""Share of zeros above which they were put there: checkpoints have 0.03 % by rounding."""


@dataclass(frozen=True)
class Recover(Training):
    """Train what earlier passes have left, with the dense model as the teacher.

    Its options are those of `graphprune.training.Training`. Without a loss a language model learns
    the teacher's distribution, and any other one its outputs.

    Attributes:
        train: see there; something has to train here.
        teacher: a model on disk, which may run code of its own where the source may; "tuned" for
            the dense one after a training of its own, of all its weights on the same samples by
            cross-entropy, which takes about as long again (Minitron, Muralidharan et al., 2024,
            tunes it where the text is foreign to it); None for the dense one, as it was read. Where
            that is what is trained, and nothing has changed it, there is nothing to learn from it,
            and the loss is the cross-entropy.
        domains: how the shares of a mixture's parts follow their losses; None for fixed shares.
        hold: whether weights that are zero as they were read stay zero, where a matrix has more
            than a few of them.
    """

    needs_data: ClassVar[bool] = True
    train: Kind = "full"
    teacher: str | None = None
    hold: bool = True
    domains: Domains | None = None

    @property
    def amount(self) -> Amount:
        """How much data it takes."""
        return TRAINING

    @property
    def passes(self) -> int:
        """How often the data goes through a model; a gradient counts as two more."""
        return 3 + (self.loss != "ce") + 3 * (self.teacher == TUNED)

    def check(self, state: State, context: Context) -> None:
        """See that the model has gradients.

        Raises:
            PlanError: it is an ONNX graph, or no language model and its teacher is to be tuned.
            LoadError: the teacher is no checkpoint, or needs code that isn't trusted.
        """
        as_traced(state.program, "recover")
        check_domains(self.domains)
        if self.teacher == TUNED and not state.program.is_causal:
            raise PlanError(
                "a teacher is tuned on what comes next in a text",
                why="the model is no causal language model",
                hint="give teacher the path of a tuned model, or leave it out",
            )
        if self.teacher not in (None, TUNED):
            usable(self.teacher, LoadError)
            if (folder := Path(self.teacher)).is_dir():
                checkpoint_class(folder, trust=context.trust)

    def run(self, state: State, context: Context) -> State:
        """Train.

        Raises:
            GraphPruneError: see `graphprune.training.recover`.
        """
        samples = context.samples(TRAINING)
        student = as_traced(state.program, "recover")
        masks = {**(_zeros_of(student) if self.hold else {}), **state.masks}
        slim = None
        if state.plan.kept_units:
            with context.stage("cutting"):
                slim = apply(student, state.plan)
            context.prove(student, state.plan, slim)
            masks = dict(kept_part(slim, list(masks), masks))
            student = as_traced(retrace(slim), "recover")
        options = {f.name: getattr(self, f.name) for f in fields(Training)}
        options["seed"] = self.seed or context.seed
        changed = student is not context.dense or bool(state.plan.kept_units)
        taught = changed or self.teacher is not None
        wanted = Training(**options).settled(teacher=taught, causal=context.dense.is_causal)
        place = saving(context)
        whole, size = as_traced(context.dense, "recover"), student.costs.total().params
        data, dealt = domains_of(self.domains, samples, whole, size)
        teacher = self._teacher(context, wanted, data) if wanted.needs_teacher else None
        with context.stage("training"):
            found = recover(
                student,
                data,
                wanted,
                masks=masks,
                teacher=teacher,
                part=context.round.part,
                callbacks=dealt,
                state=place,
                progress=each_step(context.progress),
            )
        program = found.program
        names = tuple(found.weights)
        if slim is not None:
            program = as_traced(written_back(slim, found.weights), "recover")
            dense = {name: old for old, name in slim_names(slim).items()}
            names = tuple(dense[name] for name in names if name in dense)
        details = _details(found, names, samples.described(), figures_of(dealt))
        record = Record("recover", (*found.notes, *notes_of(dealt)), details)
        return replace(state, program=program, unfitted=None).recorded(record)

    def _teacher(self, context: Context, wanted: Training, data: Any) -> Program:
        dense = as_traced(context.dense, "recover")
        if self.teacher is None:
            return dense
        if self.teacher == TUNED:
            rate = self.lr if self.train == "full" else None
            plain: dict[str, Any] = {"include": None, "exclude": (), "also": (), "lr": rate}
            alone = replace(wanted, train="full", loss="ce", **plain)
            with context.stage("tuning the teacher"):
                tell = each_step(context.progress, "tuning the teacher")
                place = saving(context, "-teacher")
                return recover(dense, data, alone, state=place, progress=tell).program
        with context.stage("loading the teacher"):
            return load_traced(self.teacher, trust=context.trust)

    def preview(self, state: State, context: Context) -> State:
        """Check what the run would do."""
        self.check(state, context)
        return state.recorded(Record("recover"))

    def describe(self, state: State) -> str:
        """One line."""
        return f"train what is left ({self.train})"


def saving(context: Context, suffix: str = "") -> Saving | None:
    """Where training saves its progress."""
    journal = context.journal()
    if journal is None:
        return None
    place = Path(journal.directory)
    return Saving(place.with_name(place.name + suffix), journal.resume)


def _zeros_of(program: Program) -> dict[str, Tensor]:
    """Masks of the matrices that have more zeros than chance or rounding leaves."""
    masks = {}
    for name in sorted(program.trainable - set(program.aliases)):
        weight = program.weights[name].detach()
        if weight.ndim > 1 and float((weight == 0).float().mean()) > _MANY:
            masks[name] = weight != 0
    return masks


def _details(
    found: Recovered, names: tuple[str, ...], samples: str, more: Mapping[str, Any]
) -> Trained | None:
    if not found.steps:
        return None
    return Trained.of("recover", names, found, samples, doing="trained", figures=more)


def each_step(
    progress: Callable[[str], None], what: str = "training"
) -> Callable[[Progress], None]:
    """Tell of each step: "training: step 3 of 200, loss 2.1034"."""

    def tell(step: Progress) -> None:
        loss = f", loss {step.loss:.4f}"
        progress(Part(what, step.step, step.steps, unit="step", rest=loss, left=step.left))

    return tell
