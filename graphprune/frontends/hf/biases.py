"""Biases for a model whose configuration can hold them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from graphprune.errors import PlanError
from graphprune.exclusive import one_at_a_time
from graphprune.frontends.hf.load import trace_model
from graphprune.frontends.hf.weightless import parameters_on_meta
from graphprune.ir.torch.program import Program


@one_at_a_time
def with_biases(program: Program, weights: Iterable[str]) -> Program:
    """The same function with zero biases beside some weights, or the program if it has them.

    The fields of the configuration that say whether layers have biases are found by trying: a
    field counts if turning it on adds biases and changes nothing else. Other layers that the same
    fields rule get zero biases, too.

    Args:
        program: of a transformers model.
        weights: canonical names of the weights of linear layers.

    Returns:
        A program of the same class. Structures keep their names; fingerprints differ.

    Raises:
        PlanError: the model is not of transformers, or no field does it.
    """
    wanted = {_bias_of(name) for name in weights}
    missing = wanted - program.weights.keys()
    if not missing:
        return program
    source = program.source
    if source is None:
        raise _refused(missing, "the model has no configuration that could ask for them")
    known = {name: tuple(program.weights[name].shape) for name in program.weights}
    for fields in _choices(source.config):
        config = copy.deepcopy(source.config)
        for field in fields:
            setattr(config, field, True)
        shapes = _shapes(source.model_class, config)
        if shapes is None or not missing <= shapes.keys():
            continue
        new = {name for name in shapes if name not in known and name not in program.aliases}
        same = all(shapes.get(n, known[n]) == known[n] for n in program.trainable)
        if same and all(name.endswith("bias") for name in new):
            return _built(program, config)
    raise _refused(missing, "no field of the configuration adds biases to these layers alone")


def _bias_of(weight: str) -> str:
    return weight.rpartition(".")[0] + ".bias"


def _choices(config: Any) -> Iterator[tuple[str, ...]]:
    """Fields that may turn biases on: each alone, then all."""
    fields = [
        name
        for name, value in sorted(vars(config).items())
        if "bias" in name and value is False and not name.startswith("_")
    ]
    for count in range(1, len(fields) + 1):
        yield from itertools.combinations(fields, count)


def _shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the state that a configuration asks for; None if the class refuses it."""
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _built(program: Program, config: Any) -> Program:
    source = program.source
    assert source is not None
    with parameters_on_meta():
        model = source.model_class(copy.deepcopy(config))
    usual = program.weights[min(program.trainable)].dtype
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        stored = program.aliases.get(name, name)
        if stored in program.weights:
            tensor = program.weights[stored].detach()
        else:
            weight = program.weights.get(f"{path}.weight")
            dtype = usual if weight is None else weight.dtype
            tensor = torch.zeros(parameter.shape, dtype=dtype)
        fresh = torch.nn.Parameter(tensor, requires_grad=False)
        model.get_submodule(path)._parameters[leaf] = fresh
    for name, _ in list(model.named_buffers()):
        if name in program.weights:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = program.weights[name]
    for alias, name in program.aliases.items():
        path, _, leaf = alias.rpartition(".")
        if leaf in model.get_submodule(path)._parameters:
            model.get_submodule(path)._parameters[leaf] = model.get_parameter(name)
    new = replace(source, config=config)
    return trace_model(model.eval(), new, "cpu")


def _refused(missing: set[str], why: str) -> PlanError:
    first = sorted(missing)[0]
    return PlanError(
        "the model can't be given biases",
        where=first,
        why=why,
        hint="repair by reconstruction, which needs none",
    )
