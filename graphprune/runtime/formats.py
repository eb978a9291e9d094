"""Formats that layers may be opened or packed in, by name."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.errors import EmitError
from graphprune.kernels.formats.files import FORMATS

AUTO = "auto"
_MOST_TOKENS = 1 << 16


def check_format(format: str, known: tuple[str, ...] = (*FORMATS, AUTO)) -> None:
    """Refuse a name that means nothing.

    Raises:
        EmitError: it isn't one of `known`.
    """
    if format not in known:
        raise EmitError(f"no format {format!r}", why=f"there are {', '.join(known)}")


def check_tokens(tokens: object) -> tuple[int, ...]:
    """Numbers of tokens that a layer can be timed with.

    Raises:
        EmitError: there is none, or one is no number from 1 on.
    """
    found = tuple(tokens) if isinstance(tokens, Sequence) else ()
    if not found or any(not isinstance(n, int) or not 1 <= n <= _MOST_TOKENS for n in found):
        raise EmitError(
            f"layers can't be timed with tokens={tokens!r}",
            hint=f"give whole numbers from 1 to {_MOST_TOKENS}, such as (1, 8)",
        )
    return found
