"""What an interrupted sweep leaves beside its output, so that it can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphprune.comparing.json import differences
from graphprune.errors import LoadError
from graphprune.files import write_text
from graphprune.pipeline.resume import Journal
from graphprune.streaming import State

_FACTS = "sweep.json"


@dataclass(frozen=True)
class Ledger:
    """The state directory of one sweep, ``.NAME.state`` beside the output ``NAME``.

    Attributes:
        directory: the directory.
        resume: whether the sweep goes on from what it holds.
    """

    directory: Path
    resume: bool

    @classmethod
    def open(
        cls, output: Path, facts: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> Ledger:
        """Begin, or go on.

        Args:
            output: what is to be written.
            facts: what the sweep is of: an interrupted one must have been of the same.
            resume: go on from what an interrupted sweep has left, if there is anything.
            overwrite: drop it instead.

        Raises:
            LoadError: an interrupted one has left something and neither is asked for, or it was of
                something else.
        """
        directory = output.with_name(f".{output.name}.state")
        found = _holds_work(directory)
        if found and not (resume or overwrite):
            raise LoadError(
                "an interrupted sweep has left its progress here",
                where=str(directory),
                hint="go on with --resume (resume=True), or begin again with --overwrite",
            )
        ledger = cls(directory, resume and found)
        if ledger.resume:
            ledger._check(facts)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            write_text(directory / _FACTS, json.dumps(facts, indent=1) + "\n")
        return ledger

    @property
    def weights(self) -> Path:
        """Where new weights of points wait that are made together."""
        return self.directory / "weights"

    def shared(self, number: int) -> State:
        """Where what some points share is saved, while it is made."""
        return State(self.directory / f"shared-{number}", resume=self.resume)

    def journal(self, number: int) -> Journal:
        """Where the passes of one point save what they do."""
        return Journal(self.directory / f"point-{number}", self.resume)

    def load(self, name: str) -> Any:
        """What was saved under a name; None for nothing."""
        path = self.directory / f"{name}.json"
        if not self.resume or not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LoadError(
                "the progress of an interrupted sweep is damaged",
                where=str(path),
                why=str(error),
                hint="begin again with --overwrite",
            ) from error

    def save(self, name: str, data: Any) -> None:
        """Save JSON data under a name."""
        write_text(self.directory / f"{name}.json", json.dumps(data) + "\n")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Drop the directory if the block ends well, or has done nothing; else say that it is."""
        try:
            yield
        except BaseException as error:
            if _holds_work(self.directory):
                error.add_note(
                    f"what is done is kept in {self.directory}: run again with --resume to go on"
                )
            else:
                shutil.rmtree(self.directory, ignore_errors=True)
            raise
        shutil.rmtree(self.directory, ignore_errors=True)

    def _check(self, facts: Mapping[str, Any]) -> None:
        path = self.directory / _FACTS
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(
                "what the interrupted sweep was of can't be read",
                where=str(path),
                why=str(error),
                hint="begin again with --overwrite",
            ) from error
        for key, was, now in differences(before, json.loads(json.dumps(facts))):
            raise LoadError(
                "the interrupted sweep was another one",
                where=str(self.directory),
                why=f"{key} was {json.dumps(was)[:80]}, and is {json.dumps(now)[:80]}",
                hint="resume with what it was begun with, or begin again with --overwrite",
            )


def _holds_work(directory: Path) -> bool:
    return any(directory.rglob("group-*.safetensors")) or any(
        path.name != _FACTS for path in directory.rglob("*.json") if path.name != "manifest.json"
    )
