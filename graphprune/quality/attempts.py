"""Measuring in such a way that what can't be measured costs nothing but its number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from graphprune.errors import EvaluationError, GraphPruneError

EXPECTED = (GraphPruneError, RuntimeError, OSError, MemoryError, IndexError)
"""What running a model may raise: torch has IndexError for an id or a place beyond a table."""


@contextmanager
def attempted(
    what: str,
    notes: list[str],
    needed: bool = False,
    caught: tuple[type[Exception], ...] = EXPECTED,
) -> Iterator[None]:
    """Let a block fail: hours of work must not be lost for a number about it.

    Args:
        what: is measured.
        notes: gets a line that says why it isn't.
        needed: whether a condition of ``fail_if`` needs it, so that nothing may be written without.
        caught: what it may raise.

    Raises:
        EvaluationError: the block failed, and it is needed.
    """
    try:
        yield
    except caught as error:
        why = _reason(error)
        if needed:
            raise EvaluationError(
                f"{what} can't be measured, and a condition of --fail-if needs it",
                why=why,
                hint="leave the condition out, or put right what is wrong",
            ) from error
        notes.append(f"{what} not measured: {why}")


def _reason(error: Exception) -> str:
    if isinstance(error, GraphPruneError):
        return f"{error.what} ({error.why})" if error.why else error.what
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
