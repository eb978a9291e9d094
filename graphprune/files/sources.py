"""Files that a run reads piece by piece, and that nobody may change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graphprune.errors import LoadError
from graphprune.files import mapped


class SourceChanged(LoadError):
    """A file isn't any more what it was when a run began to read it."""


@dataclass(frozen=True)
class Sources:
    """Files as they were when a run began.

    Attributes:
        facts: of each, what tells it from another file or another content.
        lost: how many mapped files had lost pages before.
    """

    facts: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    lost: int = 0

    def add(self, paths: Iterable[Path]) -> None:
        """Watch these files too; of a directory, the configuration and the weights in it."""
        for path in paths:
            inside = [*path.glob("*.json"), *path.glob("*.safetensors")] if path.is_dir() else []
            for file in (path, *inside):
                if file.is_file():
                    self.facts.setdefault(file, _facts(file))

    def check(self, cause: Exception | None = None) -> None:
        """See that no file has changed.

        Args:
            cause: what went wrong before anybody looked.

        Raises:
            SourceChanged: one has.
        """
        for file, before in self.facts.items():
            why = _change(before, _facts(file))
            if why is not None:
                raise _changed(str(file), why) from cause
        for path in mapped.lost[self.lost :]:
            raise _changed(path, "it was cut short") from cause

    def checking(self, progress: Callable[[str], None]) -> Callable[[str], None]:
        """A function that looks at the files before it tells of a stage."""

        def told(stage: str) -> None:
            self.check()
            progress(stage)

        return told


@contextmanager
def reading(paths: Iterable[Path] = ()) -> Iterator[Sources]:
    """Watch files for the time of the block, in which they may be mapped into memory.

    Raises:
        SourceChanged: one was changed; also in place of an error that this may have led to.
    """
    sources = Sources(lost=len(mapped.lost))
    sources.add(paths)
    with mapped.guarded():
        try:
            yield sources
        except SourceChanged:
            raise
        except Exception as error:
            sources.check(error)
            raise
        for path in mapped.lost[sources.lost :]:
            raise _changed(path, "it was cut short")


def _facts(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _change(before: tuple[int, ...], now: tuple[int, ...]) -> str | None:
    if now == before:
        return None
    if not now:
        return "it is gone"
    if now[:2] != before[:2]:
        return "another file is in its place"
    if now[2] < before[2]:
        return f"it was cut from {before[2]:,} to {now[2]:,} bytes"
    return "something was written to it"


def _changed(where: str, why: str) -> SourceChanged:
    return SourceChanged(
        "a file was changed while it was read",
        where=where,
        why=why,
        hint="leave the model alone while graphprune works, and run again",
    )
