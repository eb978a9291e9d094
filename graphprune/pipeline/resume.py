"""What a run with data keeps beside its output until that is in place, so that it can go on.

For an output ``NAME`` it is the directory ``.NAME.state``: what the run is of, and for each pass a
file with the plan that it has made, or a directory where it saves the weights that it changes
(`graphprune.streaming.State`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphprune.comparing.json import differences
from graphprune.emit.formats import shown
from graphprune.errors import LoadError
from graphprune.files import write_text
from graphprune.passes.protocol import Record, State
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe
from graphprune.streaming import State as Progress

_RUN = "run.json"


@dataclass(frozen=True)
class Journal:
    """The state directory of one run.

    Attributes:
        directory: the directory.
        resume: whether the run goes on from what it holds.
    """

    directory: Path
    resume: bool

    @classmethod
    def open(
        cls, output: Path, run: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> Journal:
        """Begin, or go on.

        Args:
            output: what is to be written.
            run: what the run is of, as JSON data: an interrupted one must have been of the same.
            resume: go on from what an interrupted run has left, if there is anything.
            overwrite: drop it instead.

        Raises:
            LoadError: an interrupted run has left something and neither is asked for, or it was of
                something else.
        """
        directory = output.with_name(f".{output.name}.state")
        found = done(directory)
        if not found or (overwrite and not resume):
            shutil.rmtree(directory, ignore_errors=True)
        elif not resume:
            raise LoadError(
                "an interrupted run has left its progress here",
                where=str(directory),
                why=_in_words(directory),
                hint="go on with --resume (resume=True), or begin again with --overwrite",
            )
        journal = cls(directory, resume and bool(found))
        if journal.resume:
            journal._check(run)
        else:
            write_text(directory / _RUN, json.dumps(run, indent=1) + "\n")
        return journal

    def has(self, label: str) -> bool:
        """Whether the interrupted run has finished a pass that is saved here."""
        return self.resume and self._file(label).exists()

    def load(self, label: str, state: State) -> State | None:
        """What a pass made of a state before the interruption.

        None where it hasn't finished, or saves itself what it does.

        Args:
            label: what the pass is called.
            state: what it was given.

        Raises:
            LoadError: the file is damaged.
        """
        if not self.has(label):
            return None
        path = self._file(label)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            notes = tuple(str(note) for note in data["notes"])
            plan = Plan.from_json(json.dumps(data["plan"]), str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(
                "a file of an interrupted run is damaged",
                where=str(path),
                why=f"{type(error).__name__}: {error}",
                hint="begin again with --overwrite",
            ) from error
        return replace(state, plan=plan).recorded(Record(label.partition("-")[2], notes))

    def save(self, label: str, state: State) -> None:
        """Keep the plan that a pass has made, so that nothing has to be scored again."""
        data = {"notes": state.records[-1].notes, "plan": json.loads(state.plan.to_json())}
        write_text(self._file(label), json.dumps(data) + "\n")

    def state(self, label: str) -> Progress:
        """Where a pass saves its progress."""
        return Progress(self.directory / label, resume=self.resume)

    def _file(self, label: str) -> Path:
        return self.directory / f"{label}.json"

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Drop the directory if the block ends well, or has done nothing; else say that it is."""
        try:
            yield
        except BaseException as error:
            found = done(self.directory)
            if not found:
                shutil.rmtree(self.directory, ignore_errors=True)
            elif not (isinstance(error, LoadError) and self._is_about(error)):
                error.add_note(
                    f"{_in_words(self.directory)} and kept in {self.directory}: "
                    "run again with --resume to go on"
                )
            raise
        shutil.rmtree(self.directory, ignore_errors=True)

    def _is_about(self, error: LoadError) -> bool:
        return error.where is not None and Path(error.where).is_relative_to(self.directory)

    def _check(self, run: Mapping[str, Any]) -> None:
        path = self.directory / _RUN
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(
                "what the interrupted run was of can't be read",
                where=str(path),
                why=str(error),
                hint="begin again with --overwrite",
            ) from error
        # The same data, as JSON gives it back.
        for key, was, now in differences(before, json.loads(json.dumps(run))):
            raise LoadError(
                "the interrupted run was another one",
                where=str(self.directory),
                why=f"{key} was {_shown(was)}, and is {_shown(now)}",
                hint="resume with what it was begun with, or begin again with --overwrite",
            )


def facts_of(recipe: Recipe, source: object) -> dict[str, Any]:
    """What an interrupted run must have in common with one that goes on from it.

    Whether the model's weights and the samples are the same, `graphprune.streaming.State` looks at.
    It may go on elsewhere.
    """
    elsewhere = {"formats", "verify", "native", "fail_if", "device", "memory"}
    data = recipe.model_dump(mode="json", exclude=elsewhere)
    plans = [Plan.load(path).to_json() for path in recipe.plans]
    found: dict[str, Any] = {"source": shown(source), "recipe": data}
    if plans:
        data.pop("plan")  # what it says counts, wherever it lies
        found["plans"] = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in plans]
    return found


def done(directory: Path) -> int:
    """Groups of weights that an interrupted run has treated, and steps that it has trained."""
    return sum(_counted(directory))


def _counted(directory: Path) -> tuple[int, int]:
    groups, steps = 0, 0
    for manifest in directory.glob("*/manifest.json"):
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
            if "run" in found:
                steps += int(found["run"]["step"])
            else:
                groups += int(found["done"])
        except (OSError, ValueError, KeyError, TypeError):
            groups += 1  # damaged: whoever resumes is told so
    return groups, steps


def _in_words(directory: Path) -> str:
    """What is done: "the weights of 3 groups are done"."""
    groups, steps = _counted(directory)
    parts = [f"the weights of {groups} groups"] if groups else []
    parts += [f"{steps} step{'s' if steps > 1 else ''} of training"] if steps else []
    return f"{' and '.join(parts)} are done"


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
