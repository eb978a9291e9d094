"""Between the names and shapes of a slim model and those of the dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.axes.expr import IntArray
from graphprune.checkpoints import memory
from graphprune.files.refusals import refused
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.streaming import apply_weights
from graphprune.streaming.core.weights import Lazily


def slim_names(slim: Slim | SlimOnnx) -> Mapping[str, str]:
    """Canonical dense names to the names of the slim model's canonical tensors."""
    return {n: s for n, s in slim.renamed.items() if n not in slim.program.aliases}


def written_back(
    slim: Slim | SlimOnnx, weights: Mapping[str, Tensor], folder: Path | None = None
) -> BaseProgram:
    """Put new weights of a slim model into its dense program, where the plan leaves something.

    Args:
        slim: the slim model.
        weights: slim name to tensor of the slim shape.
        folder: where they are that are too many for memory, in files without a name; None for the
            temporary folder.

    Raises:
        EmitError: the file system has no room for them.
    """
    folder = folder or Path(tempfile.gettempdir())
    program = slim.program
    names = {old: name for old, name in slim_names(slim).items() if name in weights}
    large = sum(program.weights[old].nbytes for old in names) > memory.HELD
    kept = slim.plan.kept(program) if slim.plan.kept_units else {}
    new = {}
    for old, name in names.items():
        weight = weights[name]
        if tuple(weight.shape) != program.parameters[old]:
            whole = program.weights[old].detach().clone()
            whole[places_of(kept[old])] = weight.to(whole)
            weight = whole
            if large and weight.device.type == "cpu":
                with refused(folder, "new weights can't be held in a file"):
                    weight = memory.in_file(weight, folder)
        new[old] = weight.to(program.weights[old].dtype)
    return apply_weights(program, new)


def places_of(kept: Sequence[IntArray]) -> tuple[Tensor, ...]:
    """Where a tensor has what is kept of each of its dimensions, to index it with."""
    return torch.meshgrid(*map(torch.from_numpy, kept), indexing="ij")


def kept_part(
    slim: Slim | SlimOnnx, parameters: Sequence[str], tensors: Mapping[str, Tensor] | None = None
) -> Mapping[str, Tensor]:
    """What a plan leaves of dense weights, by the names that they have in the slim model.

    Each is taken when it is asked for, since all of them may be more than memory holds.

    Args:
        slim: the slim model.
        parameters: of the dense program; those of which nothing stays are left out.
        tensors: of the shapes of parameters, such as masks; None for the weights.
    """
    tensors = slim.program.weights if tensors is None else tensors
    names, kept = slim_names(slim), slim.plan.kept(slim.program)
    left = {names[p]: p for p in parameters if p in names and all(map(len, kept[p]))}

    def read(name: str) -> Tensor:
        tensor, places = tensors[left[name]].detach(), kept[left[name]]
        whole = tuple(map(len, places)) == tuple(tensor.shape)
        return tensor if whole else tensor[places_of(places)]

    return Lazily(tuple(left), read)
