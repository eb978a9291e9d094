"""How commands end that can't do what they were asked: a message, or JSON."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

from graphprune.errors import GraphPruneError
from graphprune.ranks.environment import own_rank

NO_MEMORY = """there is not enough memory
  why: something had to be larger than what is free: the model, an input, or calibration data
  do: close other programs, or give a smaller model or less data"""


def message_of(error: BaseException) -> str:
    """What a person reads of an error, with its notes."""
    return "\n".join([_told(error), *(f"  note: {note}" for note in _notes(error))])


def as_data(error: BaseException) -> dict[str, Any]:
    """An error as plain data: its kind, ``what``, ``where``, ``why``, ``hint``, and notes."""
    found: dict[str, Any] = {"kind": type(error).__name__}
    if isinstance(error, GraphPruneError):
        found |= {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
    else:
        found |= {"what": _told(error).partition("\n")[0], "where": None, "why": None, "hint": None}
    return found | {"notes": list(_notes(error)), "exit_code": exit_code(error)}


def exit_code(error: BaseException) -> int:
    """What a command ends with."""
    return int(getattr(error, "exit_code", 1))


def fail(error: Exception, *, as_json: bool) -> NoReturn:
    """Print an error on stderr, and with `as_json` as JSON on stdout too; then exit.

    Of several processes that share a run the first one tells what all of them refuse.
    """
    from rich.console import Console

    rank = own_rank()
    if rank and getattr(error, "shared", False):
        sys.exit(exit_code(error))
    console = Console(stderr=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    where = f"process {rank}: " if rank else ""
    console.print(where + message_of(error), markup=False, soft_wrap=True)
    if as_json and not rank:
        sys.stdout.write(json.dumps({"error": as_data(error)}, indent=2) + "\n")
    sys.exit(exit_code(error))


def _notes(error: BaseException) -> tuple[str, ...]:
    return tuple(getattr(error, "__notes__", ()))


def _told(error: BaseException) -> str:
    if isinstance(error, GraphPruneError):
        return str(error)
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "it was stopped"
    what = " ".join(str(error).split())[:300] or "no message"
    return (
        f"internal error: {type(error).__name__}: {what}\n"
        "  do: set GRAPHPRUNE_DEBUG=1 for the traceback, and report it"
    )
