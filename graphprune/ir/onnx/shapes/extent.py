"""How large the values of an ONNX graph may be: found out before anything of that size is made."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx.shape_inference import InferenceError

from graphprune.errors import LoadError

MOST = 1 << 40
"""Elements of a value; no machine holds more, and products of sizes stay far from 2^63."""

INPUT = 1 << 31
"""Elements of an input, which has to be made up for the model to be run."""

GROWING = frozenset({
    "BlackmanWindow", "ConstantOfShape", "EyeLike", "Expand", "HammingWindow", "HannWindow",
    "MelWeightMatrix", "OneHot", "Pad", "Range", "Resize", "SplitToSequence", "StringConcat",
    "StringSplit", "Tile", "Upsample",
})  # fmt: skip
"""Operators whose results may have more elements than all of their operands."""


def check_shape(name: str, shape: Sequence[int], most: int = MOST) -> None:
    """Refuse a shape that no value can have.

    Args:
        name: of the value.
        shape: its sizes.
        most: elements that it may have.

    Raises:
        InferenceError: a size is negative, which other example inputs may change.
        LoadError: it has more elements.
    """
    if any(size < 0 for size in shape):
        raise InferenceError(f"{name} would have the shape {list(shape)}")
    if prod(shape) > most:
        raise LoadError(
            "a value of the ONNX model is too large",
            where=name,
            why=f"its shape is {list(shape)}, and {most:,} elements are the limit",
            hint="is a size wrong, or an input's size left open that should be fixed?",
        )


def may_be_computed(operator: str, shapes: Sequence[Sequence[int] | None], most: int) -> bool:
    """Whether the results of an operator are small enough to run it.

    Args:
        operator: its name.
        shapes: of its results; None for one that isn't known.
        most: elements of each.
    """
    if any(shape is None for shape in shapes) and operator in GROWING:
        return False
    return all(prod(shape) <= most for shape in shapes if shape is not None)
