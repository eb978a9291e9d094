"""JSON from elsewhere, read strictly: what can be taken for two things is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn


def read_limited(path: Path, most: int) -> bytes:
    """The bytes of a file, which may also be a pipe or a device without an end.

    Args:
        path: the file's path.
        most: bytes that are read.

    Raises:
        OSError: it can't be read.
        ValueError: it has more bytes.
    """
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return raw


def parse_json(raw: bytes | str) -> Any:
    """What JSON text says.

    Raises:
        ValueError: it isn't UTF-8 or no JSON, it is nested too deeply, an object repeats a key,
            or a number is NaN or infinite, which JSON doesn't know, or too long to be meant.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} in line {error.lineno}") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("a number has thousands of digits") from None
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {shown(twice)} is given twice")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def shown(value: object, most: int = 60) -> str:
    """A value for a message: short, and without characters that can't be printed."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        text = type(value).__name__
    return text if len(text) <= most else f"{text[:most]}..."
