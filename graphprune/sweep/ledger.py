"""What an interrupted sweep leaves beside its output, so that it can go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from graphprune.errors import LoadError
from graphprune.files import write_text
from graphprune.pipeline.resume import Journal
from graphprune.pipeline.unfinished import Unfinished
from graphprune.streaming import State


@dataclass(frozen=True)
class Ledger(Unfinished):
    """The state directory of one sweep."""

    what: ClassVar[str] = "sweep"

    @staticmethod
    def done_in(directory: Path) -> str:
        """Whether anything is done."""
        weights = any(directory.rglob("group-*.safetensors"))
        beside = ("sweep.json", "manifest.json")
        measured = any(path.name not in beside for path in directory.rglob("*.json"))
        return "some of the work is done" if weights or measured else ""

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
