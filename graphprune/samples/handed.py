"""Samples in the form that a graph takes, and how many they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.errors import LoadError
from graphprune.inputs import inputs_of
from graphprune.program import BaseProgram, Program
from graphprune.recipe_calibration import Calibration


def enough(available: int, wanted: Calibration, source: str, count: int) -> int:
    """The number of samples to take.

    Raises:
        LoadError: the recipe asks for more than there are.
    """
    if wanted.windows is not None and available < wanted.windows:
        raise LoadError(
            "there are not as many samples as the recipe asks for",
            where=source,
            why=f"{available}, and calibration.windows is {wanted.windows}",
            hint="leave calibration.windows out to take all",
        )
    return min(available, count)


def count_of(data: Any) -> int:
    """How many samples there are: all have a dimension for them."""
    if isinstance(data, list):
        return sum(count_of(one) for one in data)
    return max((len(leaf) for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)
                and leaf.dim()), default=0)  # fmt: skip


def for_graph(program: BaseProgram, data: Any) -> Any:
    """The samples in the form that the program's graph takes."""
    if isinstance(program, Program):
        only = isinstance(data, Mapping) and len(inputs_of(program)) == 1
        # One input needs no name, and may not have one: modules traced on positional inputs.
        return next(iter(data.values())) if only and len(data) == 1 else data
    return pytree.tree_map_only(Tensor, _array, data)


def _array(tensor: Tensor) -> NDArray[Any]:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
