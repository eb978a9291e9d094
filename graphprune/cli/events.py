"""``--events FILE``: what a command does as JSON Lines, for trackers and dashboards."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.cli.failures import as_data
from graphprune.errors import EmitError
from graphprune.progress import Note

if TYPE_CHECKING:
    from io import TextIOWrapper

_PLACE = re.compile(r"(\d[\d,]*) of (\d[\d,]*)")
_LOSS = re.compile(r"\bloss (-?\d[\d.]*)")


class Events:
    """Writes an event a line, each at once, so that the file can be followed.

    Args:
        file: where to; None writes nothing.
    """

    def __init__(self, file: TextIOWrapper | None) -> None:
        self.file = file
        self.began = time.perf_counter()

    def tell(self, event: str, **values: Any) -> None:
        """Write an event with the seconds since the command began."""
        if self.file is not None:
            seconds = round(time.perf_counter() - self.began, 3)
            line = {"event": event, "time": round(time.time(), 3), "seconds": seconds, **values}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def following(self, progress: Callable[[str], None]) -> Callable[[str], None]:
        """A function that shows a stage, and writes it."""

        def tell(stage: str) -> None:
            progress(stage)
            if isinstance(stage, Note):
                self.tell("note", text=str(stage))
            else:
                self.tell("stage", **read(stage))

        return tell


@contextmanager
def recorded(path: Path | None, command: str) -> Iterator[Events]:
    """Record a command: how it begins, its stages, and how it ends.

    Args:
        path: of the file, which is written anew; None records nothing.
        command: its name.

    Raises:
        EmitError: the file can't be written.
    """
    if path is None:
        yield Events(None)
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise EmitError(
            "the events can't be written", where=str(path), why=error.strerror, hint="name a file"
        ) from error
    with file:
        events = Events(file)
        events.tell("begun", command=command)
        try:
            yield events
        except BaseException as error:
            events.tell("failed", error=as_data(error))
            raise
        events.tell("ended")


def read(stage: str) -> Mapping[str, Any]:
    """What the words of a stage say: how far it is, and the loss of a step of training."""
    found: dict[str, Any] = {"stage": stage.partition(":")[0], "text": stage}
    place, loss = _PLACE.search(stage), _LOSS.search(stage)
    if place is not None:
        found |= {"done": _whole(place[1]), "of": _whole(place[2])}
    if loss is not None:
        found["loss"] = float(loss[1].rstrip("."))
    return found


def _whole(text: str) -> int:
    return int(text.replace(",", ""))
