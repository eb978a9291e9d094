"""Whether the weights of a checkpoint are what its model computes with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.errors import LoadError

ALLOW = "--allow-unused-weights"


def check_unused(
    unused: Collection[str], directory: Path, model_class: type, *, allowed: bool
) -> None:
    """Refuse weights that the model has no place for.

    Args:
        unused: their names.
        directory: of the checkpoint.
        model_class: what was built.
        allowed: whether somebody has said that they may be left out.

    Raises:
        LoadError: there are some, and nobody has.
    """
    if not unused or allowed:
        return
    raise LoadError(
        "the checkpoint has weights that the model doesn't use",
        where=str(directory),
        why=f"{model_class.__name__} of config.json has no place for {listed(unused)}",
        hint=f"use the config.json that was saved with these weights, or {ALLOW} "
        "(allow_unused_weights=True) to leave them out",
    )


def listed(names: Collection[str]) -> str:
    """So many tensors, and the first of them."""
    first = ", ".join(sorted(names)[:3])
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {first}{more}"


def unused_note(program: BaseProgram) -> tuple[str, ...]:
    """What a report says of weights that were left out."""
    source = program.source
    if source is None or not source.unused:
        return ()
    return (f"the checkpoint has weights that the model doesn't use, and that are left out: "
            f"{listed(source.unused)}",)  # fmt: skip


def check_kinds(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: Any) -> None:
    """Refuse integers and floating numbers of one byte in the place of weights.

    Raises:
        LoadError: a tensor is of another kind than the model's.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # whose numbers transformers knows how to read
    for name, tensor in state.items():
        wanted = expected.get(name)
        same = wanted is None or _kind(wanted) == _kind(tensor)
        if same and not (tensor.is_floating_point() and tensor.element_size() == 1):
            continue
        raise LoadError(
            "a weight is of a type that the model can't compute with",
            where=name,
            why=f"the file has {_brief(tensor.dtype)} for it"
            + (f", and the model has {_brief(wanted.dtype)}" if wanted is not None else "")
            + "; no quantization_config in config.json says what the numbers mean",
            hint="take the checkpoint that this one was quantised from",
        )


def is_mixed(state: Mapping[str, Tensor], config: Any) -> bool:
    """Whether transformers would convert some tensor to the dtype of the model."""
    floats = [t.dtype for t in state.values() if t.is_floating_point()]
    wanted = getattr(config, "dtype", None) or (floats[0] if floats else None)
    return any(dtype != wanted for dtype in floats)


def check_ties(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Refuse two tensors for what is one weight of the model.

    Args:
        state: what the files have.
        tied: further names of parameters to their first ones.

    Raises:
        LoadError: they differ.
    """
    for name, first in tied.items():
        if name in state and first in state and not _equal(state[name], state[first]):
            raise LoadError(
                "the checkpoint has two different tensors for one weight",
                where=f"{name} and {first}",
                why="config.json ties the two",
                hint="set tie_word_embeddings to false in config.json if both are meant, and "
                "remove one of them from the file otherwise",
            )


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other shapes than the model's.

    Raises:
        LoadError: there is one.
    """
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise LoadError(
                "the weights don't fit the configuration",
                where=name,
                why=f"config.json asks for shape {tuple(expected[name].shape)}, the file has "
                f"{tuple(tensor.shape)}",
                hint="use the config.json that was saved with these weights",
            )


def check_count(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a model that is many times as large as its files, before it is built.

    Where names differ, shapes can't be compared. Tied weights and what a class computes itself are
    in no file, so that a model may well be somewhat larger.

    Raises:
        LoadError: it is.
    """
    known = {id(t): t.numel() for t in expected.values()}.values()
    wanted, given = sum(known), sum(t.numel() for t in state.values())
    if wanted > TIMES_AS_LARGE * given + MORE:
        raise LoadError(
            "the weights don't fit the configuration",
            why=f"config.json asks for {wanted:,} numbers, and the files have {given:,}",
            hint="use the config.json that was saved with these weights",
        )


TIMES_AS_LARGE, MORE = 4, 1_000_000


def check_missing(missing: Iterable[str]) -> None:
    """Refuse a model that would have random numbers.

    Raises:
        LoadError: a parameter is missing.
    """
    names = sorted(missing)
    if names:
        raise LoadError(
            "the checkpoint lacks weights that the model needs",
            where=names[0],
            why=f"{len(names)} parameters would be random numbers",
            hint="check `architectures` in config.json",
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating"
    return "complex" if tensor.is_complex() else "whole"


def _brief(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
