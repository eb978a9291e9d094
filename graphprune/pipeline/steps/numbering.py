"""Between the names and shapes of a slim model and those of the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.axes.expr import IntArray
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.streaming import apply_weights


def slim_names(slim: Slim | SlimOnnx) -> Mapping[str, str]:
    """Canonical dense names to the names of the slim model's canonical tensors."""
    return {n: s for n, s in slim.renamed.items() if n not in slim.program.aliases}


def written_back(slim: Slim | SlimOnnx, weights: Mapping[str, Tensor]) -> BaseProgram:
    """Put new weights of a slim model into its dense program, where the plan leaves something.

    Args:
        slim: the slim model.
        weights: slim name to tensor of the slim shape.
    """
    program = slim.program
    kept = slim.plan.kept(program) if slim.plan.kept_units else {}
    new = {}
    for old, name in slim_names(slim).items():
        if name not in weights or old in program.aliases:
            continue
        weight = weights[name]
        if tuple(weight.shape) != program.parameters[old]:
            whole = program.weights[old].detach().clone()
            whole[places_of(kept[old])] = weight.to(whole)
            weight = whole
        new[old] = weight.to(program.weights[old].dtype)
    return apply_weights(program, new)


def places_of(kept: Sequence[IntArray]) -> tuple[Tensor, ...]:
    """Where a tensor has what is kept of each of its dimensions, to index it with."""
    return torch.meshgrid(*map(torch.from_numpy, kept), indexing="ij")


def kept_part(
    slim: Slim | SlimOnnx, parameters: Sequence[str], tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a plan leaves of dense weights, by the names that they have in the slim model.

    Args:
        slim: the slim model.
        parameters: of the dense program; those of which nothing stays are left out.
        tensors: of the shapes of parameters, such as masks; None for the weights.
    """
    tensors = slim.program.weights if tensors is None else tensors
    names, kept = slim_names(slim), slim.plan.kept(slim.program)
    found: dict[str, Tensor] = {}
    for parameter in parameters:
        if parameter in names and all(map(len, kept[parameter])):
            found[names[parameter]] = tensors[parameter].detach()[places_of(kept[parameter])]
    return found
