"""What a run with data keeps beside its output until that is in place, so that it can go on.

For an output ``NAME`` it is the directory ``.NAME.state``: what the run is of, and for each pass a
file with the plan that it has made, or a directory where it saves the weights that it changes
(`graphprune.streaming.State`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from graphprune.emit.formats import shown
from graphprune.errors import LoadError
from graphprune.files import write_text
from graphprune.passes.protocol import Record, State
from graphprune.pipeline.unfinished import Unfinished
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe
from graphprune.streaming import State as Progress


@dataclass(frozen=True)
class Journal(Unfinished):
    """The state directory of one run."""

    what: ClassVar[str] = "run"

    @staticmethod
    def done_in(directory: Path) -> str:
        """What is done: "the weights of 3 groups are done"."""
        groups, steps = _counted(directory)
        parts = [f"the weights of {groups} groups"] if groups else []
        parts += [f"{steps} step{'s' if steps > 1 else ''} of training"] if steps else []
        return f"{' and '.join(parts)} are done" if parts else ""

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


def _counted(directory: Path) -> tuple[int, int]:
    """Groups of weights that a run has treated, and steps that it has trained."""
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
