"""What a run does, as text that tells it from any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from graphprune.analysis.digest import raw_bytes


def identity(value: Any) -> str:
    """Canonical JSON of options: equal for equal ones, in every process and release of Python.

    Args:
        value: numbers, text, mappings, sequences, tensors, which are hashed, and objects, which
            count by their class and attributes.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, torch.Tensor):
        digest = hashlib.sha256(raw_bytes(value)).hexdigest()[:16]
        return [list(value.shape), str(value.dtype), digest]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(entry) for entry in value)
    options: Mapping[str, Any] = {}
    if is_dataclass(value) and not isinstance(value, type):
        options = {f.name: getattr(value, f.name) for f in fields(value)}
    elif not hasattr(value, "__qualname__"):
        options = vars(value)
    kind = value if hasattr(value, "__qualname__") else type(value)  # a function, or an object
    name = f"{kind.__module__}.{kind.__qualname__}"
    return {"class": name, **{key: _plain(entry) for key, entry in options.items()}}
