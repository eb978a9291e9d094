"""Text to token ids, in memory that the length of the text doesn't matter for.

A tokenizer holds a few hundred bytes for every character while it works. Long texts are handed to
it in pieces, cut where that changes no token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from graphprune.errors import LoadError

if TYPE_CHECKING:
    import torch

PIECE = 1 << 19
"""Characters that are tokenised at a time."""

_REACH = 4096
"""Characters before the end of a piece in which it may be cut."""

_TRIED = 64
"""Places that are tried there."""

_PROBE = "a text"
"""What a tokenizer is asked to encode, to see what it puts in front."""

_CONTEXT = 200
"""Characters on either side of a place that say whether a cut changes tokens."""


def tokenised(tokenizer: Any, text: str) -> torch.Tensor:
    """The tokens of a text without special ones: int64 ``[tokens]``.

    Args:
        tokenizer: A Hugging Face tokenizer, or a callable that returns its ``input_ids``.
        text: As long as it may be. Above `PIECE` characters, it is cut at spaces that have the same
            tokens on both sides without each other; where there is none, a token may differ.
    """
    import torch

    parts = [
        torch.as_tensor(_ids(tokenizer, piece), dtype=torch.long)
        for piece in _pieces(tokenizer, text)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def begin_token(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer puts in front of every text; None if it adds none.

    Models that have seen it at the start of every text in training must see it at the start of
    every window: without it the perplexity of some is six times as high. The tokenizer's own
    encoding decides, not whether it knows such a token: many know one and never add it.
    """
    plain, whole = list(_ids(tokenizer, _PROBE)), list(_ids(tokenizer, _PROBE, special=True))
    added = whole[: len(whole) - len(plain)]
    return int(whole[0]) if added and whole[:1] != plain[:1] else None


def cut(tokens: torch.Tensor, length: int, begin: int | None) -> torch.Tensor:
    """Cut tokens into windows, end to end.

    Args:
        tokens: int64 ``[tokens]``; what doesn't fill a window at the end is left out.
        length: of a window, with its first token.
        begin: what every window starts with, see `begin_token`; None for nothing.

    Returns:
        int64 ``[windows, length]``.
    """
    import torch

    size = text_tokens(length, begin)
    count = len(tokens) // size
    windows = tokens[: count * size].view(count, size)
    if begin is None:
        return windows
    return torch.cat([torch.full((count, 1), begin, dtype=torch.long), windows], dim=1)


def text_tokens(length: int, begin: int | None) -> int:
    """Return how many tokens of text a window has.

    Raises:
        LoadError: There is no room for any.
    """
    size = length - (begin is not None)
    if size < 1:
        raise LoadError(
            "a window has no room for text",
            why=f"it has {length} tokens, and the tokenizer begins every text with one of its own",
            hint="ask for longer windows",
        )
    return size


def _ids(tokenizer: Any, text: str, special: bool = False) -> Any:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _pieces(tokenizer: Any, text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end, after = _seam(tokenizer, text, start + PIECE)
        yield text[start:end]
        start = after
    yield text[start:]


def _seam(tokenizer: Any, text: str, last: int) -> tuple[int, int]:
    """Where a piece ends, at the latest, and where the next one begins.

    Tokenizers of bytes count a space to the word behind it, and others put one in front of every
    text, so that both ways are tried.
    """
    first = last - min(_REACH, PIECE // 2)
    spaces = [i for i in range(last - 1, first, -1) if text[i].isspace()]
    starts = [i for i in spaces if not text[i - 1].isspace()]
    for at in starts[:_TRIED]:
        before, whole = text[at - _CONTEXT : at], text[at - _CONTEXT : at + _CONTEXT]
        tokens = list(_ids(tokenizer, whole))
        for after in (at, at + 1):
            behind = text[after : at + _CONTEXT]
            if [*_ids(tokenizer, before), *_ids(tokenizer, behind)] == tokens:
                return at, after
    at = next(iter(starts), last)
    return at, at
