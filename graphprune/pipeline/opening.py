"""The first steps of a compilation: its recipe, and the program of its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.errors import LoadError, RecipeError
from graphprune.frontends import load
from graphprune.frontends.tracing.trace import trace
from graphprune.placement import Placement
from graphprune.recipe.recipe import Recipe


def settle(
    recipe: Recipe | Mapping[str, object] | str | Path,
    formats: Sequence[str] | None,
    seed: int | None,
    device: str | None = None,
    memory: int | None = None,
) -> Recipe:
    """A recipe of any form, with what an argument says in place of its own entry.

    Raises:
        RecipeError: it is none.
    """
    if isinstance(recipe, str | Path):
        recipe = Recipe.load(recipe)
    data = recipe.model_dump(exclude_unset=True) if isinstance(recipe, Recipe) else dict(recipe)
    if formats is not None:
        data["formats"] = tuple(formats)
    for name, value in (("seed", seed), ("device", device), ("memory", memory)):
        if value is not None:
            data[name] = value
    return Recipe.parse(data)


def placed(program: BaseProgram, placement: Placement, recipe: Recipe) -> Placement:
    """Where a program is calibrated.

    Raises:
        RecipeError: the recipe names a device that the program can't be computed on.
    """
    if program.format == "torch" or not placement.away:
        return placement
    if recipe.device != "auto":
        raise RecipeError(
            f"an ONNX model isn't calibrated on {placement}",
            where="device",
            why="ONNX Runtime computes its partitions, on the processor",
            hint="leave device out, or prune the PyTorch model and export it",
        )
    return Placement()


def open_source(
    source: str | Path | torch.nn.Module | BaseProgram,
    example: tuple[Any, ...] | Mapping[str, Any] | None,
    weights: str | Path | None,
    opening: Mapping[str, bool],
) -> BaseProgram:
    """The program of a source.

    Args:
        source: what is to be pruned; see `graphprune.compile`.
        example: example inputs of a module, ``(args, kwargs)``.
        weights: a safetensors file for the module of a factory.
        opening: options of `graphprune.load`.

    Raises:
        LoadError: it can't be opened, or an argument goes with another kind of source.
    """
    if isinstance(source, str | Path):
        return load(source, weights, **opening)
    if weights is not None:
        raise LoadError("weights from a file go with module:factory", where=str(weights))
    if isinstance(source, BaseProgram):
        if example is not None:
            raise LoadError("a program has its example inputs", hint="leave example out")
        return source
    if example is None:
        raise LoadError(
            "a module needs example inputs",
            where=type(source).__name__,
            hint="pass example=(input, ...) or example={name: input}",
        )
    if isinstance(example, Mapping):
        return trace(source, (), example)
    return trace(source, tuple(example))
