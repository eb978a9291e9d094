"""What a run tells while it works."""

from __future__ import annotations


class Note(str):
    """A remark among the names of stages: something to read, that should stay on the screen."""

    __slots__ = ()
