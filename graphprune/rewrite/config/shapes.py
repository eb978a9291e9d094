"""Comparing the shapes that a config gives with those wanted, and saying what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphprune.rewrite.config.trials import place

Shape = tuple[int, ...]


def mismatches(got: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, list[int]]:
    """Return the dimensions that are wrong, by name; none where name or rank are wrong."""
    wrong = {}
    for name, shape in wanted.items():
        other = got.get(name, ())
        dims = [i for i, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b]
        if shape != other:
            wrong[name] = dims if len(shape) == len(other) else []
    return wrong


def uneven(before: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    """Say where layers that were alike become different ones.

    Returns:
        A line for every such parameter, its layer number written as a star.
    """
    lines = []
    for where, names in _places(wanted).items():
        if len({before[name] for name in names}) == 1 < len({wanted[name] for name in names}):
            lines.append(f"{where} differs over layers: {_by_shape(names, wanted)}")
    return lines


def describe(
    got: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    follows: Mapping[tuple[str, int], Sequence[str]],
    config: str,
) -> list[str]:
    """Say what is wrong with the nearest config.

    Args:
        got: The shapes that it gives.
        wanted: The shapes that it should give.
        follows: The fields that a dimension of a parameter depends on.
        config: The name of its class.

    Returns:
        A line for every place of parameters.
    """
    lines = []
    wrong = mismatches(got, wanted)
    for where, names in _places(wrong).items():
        name = names[0]
        if name not in got:
            lines.append(f"{where} does not exist in the nearest native model")
            continue
        reasons = [
            f"dimension {dim} follows {', '.join(fields)}, which other parameters need as it is"
            if (fields := follows.get((name, dim)))
            else f"no field of {config} sets dimension {dim} by itself"
            for dim in wrong[name]
        ]
        lines.append(
            f"{where}: {_by_shape(names, wanted)}, the nearest native config gives {got[name]}; "
            + "; ".join(reasons)
        )
    return lines


def _places(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Group names by their place, layer numbers left open."""
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(place(name), []).append(name)
    return places


def _by_shape(names: Sequence[str], shapes: Mapping[str, Shape]) -> str:
    """Write "wanted (64, 48)" if all are alike, else "layers 0, 2: (64, 48), layer 1: …"."""
    by_shape: dict[Shape, list[str]] = {}
    for name in names:
        numbers = ".".join(part for part in name.split(".") if part.isdigit())
        by_shape.setdefault(shapes[name], []).append(numbers)
    if len(by_shape) == 1:
        return f"wanted {next(iter(by_shape))}"
    return ", ".join(
        f"layer{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}: {shape}"
        for shape, numbers in by_shape.items()
    )
