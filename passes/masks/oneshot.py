"""One-shot masks for a whole program: a solver at every site, on what its weights read.

The pieces are in `graphprune.solvers` (one layer), `graphprune.streaming` (the way through the
graph) and `graphprune.passes.masks.allocations` (how much of each layer goes); here they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.errors import CalibrationError, RecipeError
from graphprune.passes.masks import allocation
from graphprune.passes.masks.allocations import (
    OWL,
    Budget,
    Global,
    Sensitivity,
    Uniform,
    whole_shares,
)
from graphprune.passes.masks.collect import Collector
from graphprune.passes.masks.reordering import reordered
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparse import Layer, Sparse
from graphprune.passes.shared.gaps import Gathered, closed, gathered
from graphprune.solvers import (
    NM,
    Given,
    Norms,
    Pattern,
    SecondMoment,
    Solved,
    Solver,
    Statistic,
    Unstructured,
)
from graphprune.solvers.gap import GapClosing
from graphprune.solvers.precision import true_count
from graphprune.solvers.solved import innermost, relative_error, statistic_of
from graphprune.streaming import (
    Group,
    Held,
    Observer,
    Separable,
    Sites,
    State,
    Step,
    Treatment,
    apply_weights,
    batches,
    find_sites,
    stream,
)
from graphprune.streaming.identity import identity

__all__ = ["OWL", "Budget", "Global", "Layer", "Sensitivity", "Sparse", "sparsify"]

Choice: TypeAlias = Callable[[str, int, Tensor], Pattern]
"""The pattern of a part of a parameter: its name, the number of the part, the matrix."""


def sparsify(
    program: BaseProgram,
    samples: Any,
    solver: Solver,
    pattern: Pattern | Mapping[str, Pattern],
    *,
    budget: str | Budget = "uniform",
    keep_zeros: bool = False,
    reference: bool = False,
    errors: bool = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    held: torch.dtype | Held | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Sparse:
    """Prune the weights of a program, each with the inputs that it has in the pruned model.

    Args:
        program: a traced program with weights, or an ONNX model; it isn't changed.
        samples: see `graphprune.streaming.batches`.
        solver: see `graphprune.solvers`.
        pattern: what masks may be; a mapping from parameter gives each its own.
        budget: how the sparsity of an unstructured `pattern` is dealt to the layers: "uniform",
            "owl", "sensitivity", "global", or one with options, `OWL(...)`, `Sensitivity(...)`.
            "owl" and "sensitivity" take another pass of the samples through the dense model.
        keep_zeros: weights that are zero stay zero, and count as removed. Of n:m, a group that has
            more zeros than it needs keeps all of them.
        reference: run the dense model along, and have the weights that write into residual streams
            make up for what the streams lack, as far as held-out samples show that they can; see
            `graphprune.solvers.gap`. It costs another pass.
        errors: tell the errors of methods, too, that can do without second moments. No mask
            depends on it.
        include: globs of parameter names to choose from; None for all.
        exclude: globs of parameter names to leave out.
        held: how activations wait; see `graphprune.streaming.stream`.
        progress: called after each group of weights, of a budget's pass too.
        state: where progress is saved, and goes on from. A resumed run computes its budget anew.

    Raises:
        RecipeError: the mapping has no pattern for a parameter; the pattern has no sparsity that a
            budget could deal; or a solver that isn't one of ours would permute columns of n:m.
        PlanError: see `stream`.
        CalibrationError: see `Solver`.
        VerifyError: see `graphprune.passes.masks.reordering.reordered`.
    """
    sites = find_sites(program, include=include, exclude=exclude)
    dealt = _allocation_of(budget)
    _check_patterns(pattern, sites)
    data = batches(program, samples)

    def run(treatment: Treatment | Separable, saved: State | None = None) -> Mapping[str, Tensor]:
        along = reference and isinstance(treatment, _OneShot)
        return stream(
            program, sites, data, treatment, held=held, reference=along, progress=progress,
            state=saved,
        )  # fmt: skip

    moved = None
    if (permuting := _permuting(solver)) is not None:
        choose = pattern.__getitem__ if isinstance(pattern, Mapping) else lambda name: pattern
        moved = reordered(program, sites, permuting, choose, run)
        program, solver = moved.program, _in_place(solver)
    if dealt is None:
        choice = _as_given(pattern)
    else:
        shares = dealt.shares(program, sites, _sparsity_of(pattern), run)
        choice = _as_dealt(whole_shares(program, sites, shares, solver), pattern)
    treatment = _OneShot(solver, choice, keep_zeros, reference, errors)
    if state is not None:
        # A run must not go on from what another one has pruned in another way.
        told = [state.recipe, solver, pattern, budget, keep_zeros, reference, errors]
        state = replace(state, recipe=identity(told))
    new = run(treatment, state)
    layers = treatment.layers
    if moved is not None:
        notes = moved.notes
        layers = [
            replace(e, notes=(*e.notes, notes[e.parameter])) if e.parameter in notes else e
            for e in layers
        ]
    others = tuple(n for n in moved.changed if n not in new) if moved is not None else ()
    return Sparse(apply_weights(program, new), tuple(layers), sites.skipped, others)


@dataclass
class _OneShot:
    """Solves each part of each weight; a part that has seen no token falls back to magnitude."""

    solver: Solver
    choice: Choice
    keep_zeros: bool
    reference: bool
    errors: bool
    closing: GapClosing = field(default_factory=GapClosing)
    layers: list[Layer] = field(default_factory=list)

    def observer(self, group: Group, part: int) -> Observer:
        if self.reference:
            return gathered(group, part, 2, streams=True)
        return Collector(statistic_of(self.solver), f"{group.name}, part {part}", self.errors)

    def solve(
        self, group: Group, name: str, part: int, matrix: Tensor, observer: Observer
    ) -> _Part:
        """Prune one part of a weight; see `graphprune.streaming.Separable`."""
        pattern = self.choice(name, part, matrix)
        asked = _target(pattern)
        if self.keep_zeros:
            pattern = _preserving(pattern, matrix)
        seen: Statistic | None
        if isinstance(observer, Gathered):
            seen = observer.moment
            fits = observer.fits(name, matrix.shape[1], centred=False)
            better = closed(matrix, fits, self.closing)
            matrix = torch.where(matrix == 0, 0, better) if self.keep_zeros else better
        else:
            seen = cast("Collector", observer).statistic
        given = SecondMoment(matrix.shape[1], matrix.device) if seen is None else seen
        with _naming(name):
            solved = self.solver.solve(matrix, given, pattern)
        if solved.permutation is not None and isinstance(pattern, NM):
            raise _permuted(name)
        error = solved.error
        moment = observer.moment if isinstance(observer, Collector) else None
        if moment is not None and not moment.silent:
            error = relative_error(matrix, solved.weight, moment)
        removed = solved.mask.numel() - true_count(solved.mask)
        notes = (*solved.notes, *_few(given, solved))
        return _Part(solved.weight, removed, error, notes, asked)

    def assemble(self, group: Group, name: str, weight: Tensor, solved: Sequence[_Part]) -> Tensor:
        """Put a weight together, and note what became of it."""
        errors = [s.error for s in solved if s.error is not None]
        stacked = torch.stack([s.weight for s in solved])
        new = group.layout(name).restored(stacked, weight.shape)
        self.layers.append(
            Layer(
                name,
                weight.numel(),
                sum(s.removed for s in solved),
                sum(errors) / len(errors) if errors else None,
                tuple(_counted(note for s in solved for note in s.notes)),
                zeros=_zeros(new),
                target=sum(s.target for s in solved) / len(solved),
            )
        )
        return new

    def record(self, group: Group) -> Any:
        """What the report says of a group, for a run that goes on after an interruption."""
        return [asdict(e) for e in self.layers if e.parameter in group.parameters]

    def recall(self, group: Group, record: Any) -> None:
        """Take it up again."""
        self.layers += [Layer(**{**entry, "notes": tuple(entry["notes"])}) for entry in record]


@dataclass(frozen=True, eq=False)
class _Part:
    """What became of one part of a weight.

    Attributes:
        weight: [out, in], with zeros.
        removed: how many weights the mask removes.
        error: see `graphprune.solvers.Solved`.
        notes: what was unusual.
        target: the sparsity that was asked for.
    """

    weight: Tensor
    removed: int
    error: float | None
    notes: tuple[str, ...]
    target: float


@contextmanager
def _naming(parameter: str) -> Iterator[None]:
    """Solvers know numbers, not names: add the parameter to what they refuse."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(
            error.what, where=error.where or parameter, why=error.why, hint=error.hint
        ) from error


def _as_given(pattern: Pattern | Mapping[str, Pattern]) -> Choice:
    if isinstance(pattern, Mapping):
        return lambda name, part, matrix: pattern[name]
    return lambda name, part, matrix: pattern


def _as_dealt(
    shares: Mapping[str, Sequence[float]], pattern: Pattern | Mapping[str, Pattern]
) -> Choice:
    """Patterns of the sparsities of a budget, which may empty a matrix."""

    def choice(name: str, part: int, matrix: Tensor) -> Pattern:
        share = shares[name][part]
        if share >= 1:
            return Given(torch.zeros(matrix.shape, dtype=torch.bool, device=matrix.device))
        assert isinstance(pattern, Unstructured)
        return replace(pattern, sparsity=share)

    return choice


def _check_patterns(pattern: Pattern | Mapping[str, Pattern], sites: Sites) -> None:
    if not isinstance(pattern, Mapping):
        return
    missing = [name for name in sites.parameters if name not in pattern]
    if missing:
        raise RecipeError(
            "there is no pattern for a parameter",
            where=missing[0],
            why=f"{len(missing)} of {len(sites.parameters)} have none",
            hint="give every one its own, or exclude the rest",
        )


def _sparsity_of(pattern: Pattern | Mapping[str, Pattern]) -> float:
    """The sparsity that a budget deals.

    Raises:
        RecipeError: there is none.
    """
    if isinstance(pattern, Unstructured):
        return pattern.sparsity
    what = "a mapping of patterns" if isinstance(pattern, Mapping) else str(pattern)
    raise RecipeError(
        f"a layer budget can't deal {what}",
        why="it moves sparsity between layers, and these patterns fix that of each",
        hint="give Unstructured(sparsity), or the uniform budget",
    )


def _permuting(solver: Solver) -> RIA | None:
    """The RIA that wants another order of inputs, if there is one."""
    solver = innermost(solver)
    return solver if isinstance(solver, RIA) and solver.permute else None


def _in_place(solver: Solver) -> Solver:
    """A solver that takes the order of inputs as it is."""
    first: Solver | None = getattr(solver, "first", None)
    if first is not None:
        return replace(solver, first=_in_place(first))  # type: ignore[type-var]
    return replace(solver, permute=False) if isinstance(solver, RIA) else solver


def _permuted(where: str) -> RecipeError:
    return RecipeError(
        "the solver would permute the inputs of a weight",
        where=where,
        why="the weight as it is stored would not be n:m",
        hint="RIA(permute=True) reorders what can be; of another solver take Solved.permutation "
        "and permute the inputs yourself",
    )


def _target(pattern: Pattern) -> float:
    """The sparsity that a pattern asks for."""
    if isinstance(pattern, Unstructured):
        return pattern.sparsity
    if isinstance(pattern, NM):
        return 1 - pattern.n / pattern.m
    return 1 - float(pattern.kept.double().mean())


def _preserving(pattern: Pattern, matrix: Tensor) -> Pattern:
    """A pattern that lets no zero come back."""
    if isinstance(pattern, Given):
        return Given(pattern.kept.to(matrix.device) & (matrix != 0))
    return replace(pattern, preserve=True)


def _few(statistic: Statistic, solved: Solved) -> Iterator[str]:
    """A note on correlations of fewer rows than inputs."""
    if not isinstance(statistic, Norms) and 0 < statistic.tokens < statistic.features:
        note = f"{statistic.tokens} tokens for {statistic.features} inputs"
        if note not in solved.notes and not statistic.silent:
            yield note


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(weight.count_nonzero())


def _counted(notes: Iterable[str]) -> Iterator[str]:
    """Each note once, with the number of parts that it is about."""
    counts: dict[str, int] = {}
    for note in notes:
        counts[note] = counts.get(note, 0) + 1
    for note, count in counts.items():
        yield note if count == 1 else f"{note} ({count} parts)"


def _allocation_of(given: str | Budget) -> Budget | None:
    """A budget by its name; None where every weight gets the same.

    Raises:
        RecipeError: there is no such budget.
    """
    found = given
    if isinstance(given, str):
        try:
            found = allocation(given, {})
        except ValueError as error:
            raise RecipeError(str(error), where="the layer budget") from error
    assert not isinstance(found, str)
    return None if isinstance(found, Uniform) else found
