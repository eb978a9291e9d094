"""What torchrun tells the processes that it starts. torch isn't imported for it."""

from __future__ import annotations

import os


def started() -> int:
    """How many processes have been started together."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def own_rank() -> int:
    """The number of this process among them."""
    return _number("RANK", 0) if started() > 1 else 0


def own_place() -> int:
    """The number of this process among those of this machine."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, otherwise: int) -> int:
    found = os.environ.get(name, "")
    return int(found) if found.isdigit() else otherwise
