"""Reference losses of domains, as people give them: by domain, in order, in a file, or by a law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from graphprune.errors import TrainingError
from graphprune.files.json import parse_json
from graphprune.training.domains.scaling import extrapolated

Given: TypeAlias = Mapping[str, Any] | Sequence[float] | str | Path
"""Losses by domain, or in the order of the domains; ``sizes`` of models in parameters and their
``losses`` by domain, from which those of a model of another size follow; or a JSON file of one of
these."""

_LAW = {"sizes", "losses"}


def read_reference(given: Given) -> Any:
    """What is given, read from its file.

    Raises:
        TrainingError: the file can't be read.
    """
    if not isinstance(given, str | Path):
        return given
    try:
        return parse_json(Path(given).read_bytes())
    except (OSError, ValueError) as error:
        raise TrainingError(
            "reference losses can't be read", where=str(given), why=str(error)
        ) from error


def reference_losses(
    given: Given, names: Sequence[str], size: int | None = None
) -> tuple[float, ...]:
    """Reference losses in the order of the domains.

    Args:
        given: what somebody has given.
        names: of the domains.
        size: parameters of the model that is trained, which a scaling law needs.

    Raises:
        TrainingError: one is missing or no number, or the sizes are too few for a law.
    """
    read = read_reference(given)
    if isinstance(read, Mapping) and set(read) == _LAW:
        if size is None:
            raise TrainingError(
                "a scaling law needs the size of the model", hint="give size, its parameters"
            )
        sizes = _numbers(read["sizes"], "sizes")
        losses = _of_names(read["losses"], names)
        return tuple(
            extrapolated(sizes, _numbers(own, name), size)
            for name, own in zip(names, losses, strict=True)
        )
    return _numbers(_of_names(read, names), "losses")


def _of_names(read: Any, names: Sequence[str]) -> list[Any]:
    """The entries of the domains."""
    if isinstance(read, Mapping):
        missing = sorted(set(names) - set(read))
        found = [read[name] for name in names if name in read]
    elif isinstance(read, Sequence) and not isinstance(read, str):
        missing, found = [] if len(read) == len(names) else list(names), list(read)
    else:
        missing, found = list(names), []
    if missing:
        raise _wrong(f"missing: {', '.join(missing)}")
    return found


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise _wrong(f"{what}: {values!r} is no list of numbers")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise _wrong(f"{what}: {value!r} is no number")
    return tuple(float(value) for value in values)


def _wrong(why: str) -> TrainingError:
    return TrainingError(
        "every domain needs a reference loss",
        why=why,
        hint="give one for each of this model's domains, or take those of the dense model",
    )
