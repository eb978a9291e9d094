"""What one process of several does for all: it claims the output, and saves what has been done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from graphprune.analysis.digest import weights_digest
from graphprune.emit.target import Target
from graphprune.passes.protocol import Record, State
from graphprune.pipeline.resume import Journal, facts_of
from graphprune.pipeline.run import Run
from graphprune.plan.plan import Plan
from graphprune.ranks.group import RanksError, current


@contextmanager
def claimed(target: Target | None) -> Iterator[Target | None]:
    """Have an output for this run alone; the first process holds the claim.

    Raises:
        EmitError: another run has it.
    """
    ranks, found = current(), target
    with ExitStack() as stack:

        def claim() -> None:
            nonlocal found
            if target is not None and ranks.lead:
                found = stack.enter_context(target.claimed())

        ranks.agree(claim)
        yield found


@contextmanager
def journaled(run: Run, source: object, target: Target | None, resume: bool) -> Iterator[None]:
    """Save the progress of a run that fits weights beside its output, until that is in place."""
    if target is None or not any(one.fits_weights for one in run.recipe.passes):
        yield
        return
    place, facts, ranks = target, facts_of(run.recipe, source), current()
    run.saved = ranks.first(
        lambda: Journal.open(place.path, facts, resume=resume, overwrite=place.overwrite)
    )
    if not ranks.lead:
        yield
        return
    with run.saved.kept():
        yield


def has_done(journal: Journal | None, label: str) -> bool:
    """Whether the interrupted run has finished a pass; see `Journal.has`."""
    return journal is not None and current().first(lambda: journal.has(label))


def load(journal: Journal | None, label: str, state: State) -> State | None:
    """What a pass made of a state before the interruption; see `Journal.load`."""

    def read() -> tuple[Plan, Record] | None:
        found = None if journal is None else journal.load(label, state)
        return None if found is None else (found.plan, found.records[-1])

    made = None if journal is None else current().first(read)
    return None if made is None else replace(state, plan=made[0]).recorded(made[1])


def save(journal: Journal | None, label: str, state: State) -> None:
    """Keep the plan that a pass has made; see `Journal.save`."""
    if journal is not None and current().lead:
        journal.save(label, state)


def settled_alike(before: State, found: State) -> State:
    """What a pass has made, on every process as on the first one.

    Raises:
        RanksError: the processes have come to different weights.
    """
    ranks = current()
    if ranks.world == 1:
        return found
    if found.program is not before.program:
        digests = ranks.agree(lambda: weights_digest(found.program))
        if len(set(digests)) > 1:
            raise RanksError(
                f"the processes have come to different weights after {found.records[-1].name}",
                where=f"processes {', '.join(map(str, range(ranks.world)))}",
                why="a pass that doesn't know of other processes isn't deterministic, or they "
                "read different files or run different versions",
                hint="run it in one process",
            )
    # A score that machines of several kinds round differently may tip a tie.
    return replace(found, plan=ranks.broadcast(0, found.plan))
