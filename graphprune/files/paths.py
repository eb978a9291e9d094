"""Paths that a user gave, before anything is made of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from graphprune.errors import GraphPruneError, LoadError

_FORM = re.compile(r"(?P<code>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)")


def usable(path: str | Path, error: type[GraphPruneError] = LoadError) -> Path:
    """A path that the file system takes for one; there needn't be anything.

    `Path.exists` and its like raise for the others: names of more than 255 bytes, loops of links,
    directories that may not be searched.

    Args:
        path: the file's path.
        error: what to raise.

    Raises:
        GraphPruneError: the file system doesn't take it.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as problem:
        raise error(
            "the path can't be used",
            where=str(path),
            why=getattr(problem, "strerror", None) or str(problem),
            hint="check its spelling, and who may read the directories on its way",
        ) from None
    return Path(path)


def is_factory(source: str | Path) -> bool:
    """Whether `source` has the form ``module:name`` or ``file.py:name``.

    Raises:
        LoadError: it is no name that the file system takes.
    """
    return _FORM.fullmatch(str(source)) is not None and not usable(source).exists()


def file_of(source: str | Path) -> Path:
    """The path that a source names: of ``file.py:name`` the file, of others themselves."""
    return Path(str(source).rpartition(":")[0] if is_factory(source) else source)
