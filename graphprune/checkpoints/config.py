"""What a ``config.json`` says, looked at before transformers acts on it.

transformers trusts a configuration: it makes lists as long as a field says, and builds as many
layers. Whatever can be told from the file alone is told here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import LoadError

LARGEST = 16 << 20
"""Bytes of a file; the largest ones list some ten thousand labels."""

DEEPEST = 50
"""Objects and lists within each other."""

FLOATING = frozenset(
    "float float4_e2m1fn_x2 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu float16 half bfloat16 float32 float64 double".split()
)
"""The floating-point types of torch, by all of their names; known here without importing it."""

WINDOW = 2048
"""Tokens in a window, where the model can take as many."""

WINDOWS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
"""Fields that say how many tokens a language model takes."""

MOST = {
    "layers": (re.compile(r"(^|_)(layers?|blocks|depths?|stages)$"), 10_000),
    "labels": (re.compile(r"(^|_)labels$"), 1_000_000),
}
"""What is counted: by fields of which names, and how many of them a model may have."""


def read_config(file: Path) -> dict[str, Any]:
    """The data of a configuration file.

    Raises:
        LoadError: it is too large, no JSON object, or has a field that no model could follow.
    """
    if file.stat().st_size > LARGEST:
        raise _refused(file, None, f"it has {file.stat().st_size:,} bytes, and at most "
                       f"{LARGEST:,} are read")  # fmt: skip
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise _refused(file, None, f"it isn't UTF-8: {error.reason} at byte {error.start}") from (
            error
        )
    except RecursionError as error:
        raise _refused(file, None, f"it is nested more than {DEEPEST} deep") from error
    except ValueError as error:
        raise _refused(file, None, f"it isn't JSON: {error}") from error
    if not isinstance(data, dict):
        raise _refused(file, None, f"it has to be a JSON object, and is a {type(data).__name__}")
    for path, value in _fields(data, file):
        if path[0] == "quantization_config":
            continue
        why = _impossible(next(key for key in reversed(path) if isinstance(key, str)), value)
        if why is not None:
            raise _refused(file, path, why)
    for name in _KINDS:
        why = _wrong_kind(name, data.get(name))
        if why is not None:
            raise _refused(file, (name,), why)
    return data


def shown(path: tuple[str | int, ...]) -> str:
    """A field as people write it: ``text_config.depths[2]``."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return "".join(parts).removeprefix(".")


def _fields(
    data: Any, file: Path, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value but objects and lists, with its path."""
    if len(path) > DEEPEST:
        raise _refused(file, path[:2], f"it is nested more than {DEEPEST} deep")
    if isinstance(data, Mapping | list):
        for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _fields(value, file, (*path, key))
    elif path:
        yield path, data


def _impossible(name: str, value: Any) -> str | None:
    """What is wrong with a field, whatever the model."""
    if isinstance(value, float) and math.isnan(value):
        return "it is not a number"
    if isinstance(value, str) and not value.isprintable() and _has_surrogates(value):
        return "it is no text: it has half a character"
    if name in ("dtype", "torch_dtype") and not _is_floating(value):
        return f"{value!r} is no floating-point type of torch"
    for counted, (pattern, most) in MOST.items():
        if type(value) is int and value > most and "window" not in name and pattern.search(name):
            return f"it asks for {value:,} {counted}, and no model has more than {most:,}"
    return None


def _is_floating(value: Any) -> bool:
    """Whether it is the name of a floating-point type, or leaves the type open."""
    named = isinstance(value, str) and value.removeprefix("torch.") in FLOATING
    return value in (None, "auto") or named


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


_KINDS: dict[str, tuple[type, str]] = {
    "architectures": (list, "a list of names of classes"),
    "dtype": (str, "the name of a type of torch"),
    "torch_dtype": (str, "the name of a type of torch"),
    "model_type": (str, "a name"),
    "quantization_config": (dict, "an object"),
}


def _wrong_kind(name: str, value: Any) -> str | None:
    kind, word = _KINDS[name]
    fits = value is None or isinstance(value, kind)
    if name == "architectures" and value is not None:
        fits = fits and all(isinstance(v, str) for v in value)
    return None if fits else f"it has to be {word}, and is {_brief(value)}"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _refused(file: Path, path: tuple[str | int, ...] | None, why: str) -> LoadError:
    return LoadError(
        "the configuration can't be used",
        where=f"{shown(path)} in {file}" if path else str(file),
        why=why,
        hint="correct the field, or take the config.json that was saved with the weights"
        if path
        else "save or download the checkpoint again",
    )
