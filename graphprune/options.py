"""What the sections of a recipe are made of: numbers, words and the errors that name a near one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fractions import Fraction

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_HUGE = re.compile(r"e[-+]?[0-9_]{4,}", re.IGNORECASE)


class Data(BaseModel):
    """A section: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Says which valid word was probably meant: ``did you mean 'ffn'?``, or lists them all."""
    valid = tuple(valid)
    close = difflib.get_close_matches(word[:80], valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"the valid ones are {', '.join(valid)}"


def parse_number(value: object) -> int | float:
    """Reads ``0.25``, ``"1/3"``, ``"25%"``, ``64`` or ``"100M"``.

    Raises:
        ValueError: The value is none of these.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    if isinstance(value, int | float):
        return value
    text = value.strip()
    try:
        if len(text) > 40 or _HUGE.search(text):
            raise ValueError  # Fraction would write out all of its digits
        if text.endswith("%"):
            return float(Fraction(text[:-1]) / 100)
        if "/" in text:
            return float(Fraction(text.replace(" ", "")))
        if match := re.fullmatch(r"([0-9_.]+)\s*([KMGBT]?)", text, re.IGNORECASE):
            number = Fraction(match[1]) * _SUFFIXES[match[2].upper()]
            whole = number.denominator == 1 and "." not in text.rstrip("KMGBTkmgbt")
            return int(number) if whole or match[2] else float(number)
        return float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{value!r} is not a number; write 0.25, 1/3, 25%, 64 or 100M") from None


def removed_fraction(value: object) -> float:
    """Reads a fraction to remove, at least 0 and below 1.

    Raises:
        ValueError: The value is none.
    """
    number = parse_number(value)
    if not 0 <= number < 1:
        raise ValueError(f"{value!r} is not a fraction to remove: 0 <= fraction < 1")
    return float(number)


def one_of(kind: str, valid: tuple[str, ...]) -> AfterValidator:
    """A check that a word is one of some."""

    def check(word: str) -> str:
        if word not in valid:
            raise ValueError(f"unknown {kind} '{word}'; {nearest(word, valid)}")
        return word

    return AfterValidator(check)


def listed(value: object) -> object:
    """A word alone as a list of one."""
    return (value,) if isinstance(value, str) else value


def bare(key: str) -> BeforeValidator:
    """Takes a bare word as a mapping of it alone: ``obs`` for ``{name: obs}``."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)
