"""Which weights of a module are pruned, where no graph tells what they multiply."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.training.schedule.options import GradualPruning

_OUT_FIRST = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_IN_FIRST = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Target:
    """A parameter that is pruned.

    Attributes:
        name: the first of its names in the module.
        inputs: where its elements for one output lie: in a row, "last", or in a column, "first";
            None where nothing says so.
    """

    name: str
    inputs: Literal["first", "last"] | None

    def rows(self, weight: Tensor) -> Tensor:
        """The elements as ``[out, in]``."""
        assert self.inputs is not None
        return weight.flatten(1) if self.inputs == "last" else weight.T

    def restored(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `rows`."""
        return (rows if self.inputs == "last" else rows.T).reshape(shape)


def find_targets(module: nn.Module, options: GradualPruning) -> tuple[Target, ...]:
    """The parameters that options choose; tied ones once.

    Raises:
        TrainingError: a glob fits nothing, nothing is left, or a weight can't be pruned so.
    """
    _check_wrappers(module)
    uses = _uses(module)
    for glob in (*(options.include or ()), *options.exclude):
        if not any(fnmatchcase(n, glob) for use in uses for n in use.names):
            raise TrainingError("a glob fits no parameter", where=glob)
    head = _head(module)
    found = []
    for use in uses:
        if options.include is None:
            chosen = use.parameter.requires_grad and use.is_matrix() and use.parameter is not head
        else:
            chosen = use.matches(options.include)
        if not chosen or use.matches(options.exclude):
            continue
        _check(use, options)
        found.append(Target(use.names[0], use.inputs()))
    if not found:
        raise TrainingError(
            "there is nothing to prune",
            where=type(module).__name__,
            why="no layer has a matrix that trains" if options.include is None else None,
            hint="name parameters with include",
        )
    return tuple(found)


@dataclass
class _Use:
    """A parameter, its names, and the modules that own it."""

    parameter: nn.Parameter
    names: list[str]
    owners: list[nn.Module]

    def matches(self, globs: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, glob) for name in self.names for glob in globs)

    def is_matrix(self) -> bool:
        """Whether it is one that a layer multiplies by, and of which much can go."""
        shape = self.parameter.shape
        if len(shape) < 2 or shape[0] == 1:
            return False
        if all(isinstance(o, (*_OUT_FIRST, *_IN_FIRST)) or _is_conv1d(o) for o in self.owners):
            return getattr(self.owners[0], "groups", 1) == 1 or shape[1] > 1
        return len(shape) == 3 and min(shape) > 1  # experts in one parameter

    def inputs(self) -> Literal["first", "last"] | None:
        if all(_is_conv1d(owner) for owner in self.owners):
            return "first"
        return "last" if all(isinstance(owner, _OUT_FIRST) for owner in self.owners) else None


def _uses(module: nn.Module) -> list[_Use]:
    found: dict[int, _Use] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = module.get_submodule(name.rpartition(".")[0])
        use = found.setdefault(id(parameter), _Use(parameter, [], []))
        use.names.append(name)
        use.owners.append(owner)
    return list(found.values())


def _check(use: _Use, options: GradualPruning) -> None:
    name = use.names[0]
    if not use.parameter.dtype.is_floating_point or use.parameter.is_meta:
        raise TrainingError(
            "a weight can't be pruned",
            where=name,
            why=f"it is {'on the meta device' if use.parameter.is_meta else use.parameter.dtype}",
            hint="prune before quantising, and exclude what has no weights",
        )
    if use.parameter.numel() == 0:
        raise TrainingError(
            "a weight can't be pruned",
            where=name,
            why="this process has nothing of it, and doesn't know its shape",
            hint="of DeepSpeed take ZeRO-2 at most, or shard with FSDP2 (fully_shard)",
        )
    if options.pattern is not None and use.inputs() is None:
        raise TrainingError(
            f"a pattern of {options.pattern} can't be chosen",
            where=name,
            why=f"nothing says which dimension of {type(use.owners[0]).__name__} is its inputs'",
            hint="exclude it, or ask for a sparsity",
        )


def _check_wrappers(module: nn.Module) -> None:
    """Refuse what hides or replaces the weights that are to be zero."""
    if hasattr(module, "peft_config"):
        raise TrainingError(
            "a model with adapters can't be pruned while they train",
            where=type(module).__name__,
            why="adapters are added to the weights, and would fill their zeros when merged",
            hint="merge them first; graphprune.training.recover trains adapters inside of masks",
        )
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise TrainingError(
            "a model in FSDP1 can't be pruned",
            where=type(module).__name__,
            why="it flattens parameters",
            hint="shard with FSDP2 (fully_shard; fsdp_version: 2 of accelerate)",
        )


def _head(module: nn.Module) -> Any:
    """The weight that makes the logits of a model of transformers, if it has one."""
    found: Any = getattr(module, "get_output_embeddings", lambda: None)()
    return getattr(found, "weight", None)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, which stores ``[in, out]``."""
    known: Any = sys.modules.get("transformers.pytorch_utils")
    return known is not None and isinstance(module, known.Conv1D)
