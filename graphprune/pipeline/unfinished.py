"""What is kept of work that may be interrupted, beside its output until that is in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from graphprune.comparing.json import differences
from graphprune.errors import LoadError
from graphprune.files import write_text


@dataclass(frozen=True)
class Unfinished:
    """A state directory, ``.NAME.state`` beside the output ``NAME``.

    Attributes:
        directory: the directory.
        resume: whether the work goes on from what it holds.
        what: what the work is called.
    """

    directory: Path
    resume: bool
    what: ClassVar[str]

    @staticmethod
    def done_in(directory: Path) -> str:
        """What is done of interrupted work, "3 groups are done"; empty where nothing is."""
        raise TypeError("a kind of work says what is done of it")

    @classmethod
    def open(cls, output: Path, facts: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Self:
        """Begin, or go on.

        Args:
            output: what is to be written.
            facts: what the work is of, as JSON data: what was interrupted must be of the same.
            resume: go on from what interrupted work has left, if there is anything.
            overwrite: drop it instead.

        Raises:
            LoadError: interrupted work has left something and neither is asked for, or it was of
                something else.
        """
        directory = output.with_name(f".{output.name}.state")
        done = cls.done_in(directory)
        if done and not (resume or overwrite):
            raise LoadError(
                f"an interrupted {cls.what} has left its progress here",
                where=str(directory),
                why=done,
                hint="go on with --resume (resume=True), or begin again with --overwrite",
            )
        found = cls(directory, resume and bool(done))
        if found.resume:
            found._check(facts)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            write_text(found._facts, json.dumps(facts, indent=1) + "\n")
        return found

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Drop the directory if the block ends well, or has done nothing; else say that it is."""
        try:
            yield
        except BaseException as error:
            done = self.done_in(self.directory)
            if not done:
                shutil.rmtree(self.directory, ignore_errors=True)
            elif not (isinstance(error, LoadError) and self._is_about(error)):
                error.add_note(
                    f"{done} and kept in {self.directory}: run again with --resume to go on"
                )
            raise
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _facts(self) -> Path:
        return self.directory / f"{self.what}.json"

    def _is_about(self, error: LoadError) -> bool:
        return error.where is not None and Path(error.where).is_relative_to(self.directory)

    def _check(self, facts: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._facts.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(
                f"what the interrupted {self.what} was of can't be read",
                where=str(self._facts),
                why=str(error),
                hint="begin again with --overwrite",
            ) from error
        # The same data, as JSON gives it back.
        for key, was, now in differences(before, json.loads(json.dumps(facts))):
            raise LoadError(
                f"the interrupted {self.what} was another one",
                where=str(self.directory),
                why=f"{key} was {_shown(was)}, and is {_shown(now)}",
                hint="resume with what it was begun with, or begin again with --overwrite",
            )


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
