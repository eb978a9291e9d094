"""The resize patch: how a module of the original size becomes its slim self.

A :class:`Patch` is plain data, found once (`graphprune.rewrite.module.attributes`) and applied to
any instance of the original class, on the meta device as well. Its source and that of `apply_patch`
are copied into the modelling file of self-contained Hugging Face checkpoints, so nothing but torch
and the standard library may be used by the two.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Patch:
    """What differs between a module and its slim form. Names are those of the slim module.

    Attributes:
        dropped: Path of a module list or sequential to the positions of the children that leave
            it; here alone paths and positions are those of the original module.
        shapes: Parameter, buffer or tensor attribute to its new shape.
        attributes: Module path to attribute to new value.
        persistent: Buffers that have to be stored although their class computes them, since it
            would compute other values.
        config: Dotted field of the module's ``config`` to its new value.
    """

    dropped: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    persistent: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the patch as plain JSON data, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Patch:
        """Return the patch that `to_json` gave."""
        return cls(**data)


def apply_patch(module: nn.Module, patch: Patch) -> None:
    """Resize a module of the original size in place.

    A resized tensor keeps the leading part of its old values, dtype, device, requires_grad and
    ties: the slim weights are to be loaded afterwards.
    """
    # Inner stacks first: the paths are those from before anything was renumbered.
    for stack in sorted(patch.dropped, key=lambda path: path.count("."), reverse=True):
        children = module.get_submodule(stack)._modules
        gone = set(patch.dropped[stack])
        numbered = all(name == str(i) for i, name in enumerate(children))
        kept = [pair for i, pair in enumerate(children.items()) if i not in gone]
        children.clear()
        for i, (name, child) in enumerate(kept):
            children[str(i) if numbered else name] = child

    resized: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, shape in patch.shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = getattr(owner, leaf)
        if id(old) not in resized:
            new = old.detach()[tuple(slice(size) for size in shape)].clone()
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            resized[id(old)] = new, old  # keeping old alive keeps its id from being used again
        setattr(owner, leaf, resized[id(old)][0])

    for path, edits in patch.attributes.items():
        owner = module.get_submodule(path)
        for name, value in edits.items():
            if isinstance(value, (list, tuple)):  # JSON has no tuples
                value = type(getattr(owner, name))(value)
            setattr(owner, name, value)

    for name in patch.persistent:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        owner.register_buffer(leaf, getattr(owner, leaf), persistent=True)

    for dotted, value in patch.config.items():
        target: Any = module.config
        *path_to_field, last = dotted.split(".")
        for key in path_to_field:
            target = target[key] if isinstance(target, dict) else getattr(target, key)
        if isinstance(target, dict):
            target[last] = value
        else:
            setattr(target, last, value)


# What follows is not part of self-contained checkpoints.


def skeleton(module: nn.Module) -> nn.Module:
    """Copy a module without its weights.

    Returns:
        A copy whose parameters and buffers are on the meta device and tied as in the original;
        everything else is a deep copy.
    """
    memo: dict[int, Any] = {}
    for _, tensor in named_tensors(module):
        if id(tensor) not in memo:
            empty: torch.Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = empty
    for inner in module.modules():
        for value in vars(inner).values():  # what a hook computes, such as an old weight norm's
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers under all of their names, tied ones included."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """Return the submodule that a tensor belongs to and its name there; None for no such module."""
    path, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(path), leaf
    except AttributeError:
        return None, leaf


def slim_name(name: str, dropped: Mapping[str, Sequence[int]]) -> str | None:
    """Return what a module or tensor is called once layers have left, None if it left as well."""
    parts = name.split(".")
    renamed = list(parts)
    for i in range(1, len(parts)):
        gone = dropped.get(".".join(parts[:i]), ())
        if gone and parts[i].isdigit():
            index = int(parts[i])
            if index in gone:
                return None
            renamed[i] = str(index - sum(other < index for other in gone))
    return ".".join(renamed)


def difference(
    base: nn.Module,
    slim: nn.Module,
    persistent: Sequence[str] = (),
    idle: Collection[str] = (),
) -> Patch:
    """Compute the patch that makes `base` like `slim`, two instances of the same class.

    Args:
        base: The module that the patch is for. Unless it is on the meta device, the values of
            its non-persistent buffers count as well.
        slim: A resized module with the same submodules.
        persistent: Buffers to store, in addition to those whose shapes differ.
        idle: Buffers that nothing reads: `base` may keep its own.
    """
    target = dict(named_tensors(slim))
    shapes = {
        name: tuple(target[name].shape)
        for name, tensor in named_tensors(base)
        if name not in idle and tensor.shape != target[name].shape
    }
    attributes = {}
    for path, module in base.named_modules():
        new = plain_attributes(slim.get_submodule(path))
        old = plain_attributes(module)
        edits = {n: new[n] for n in old if n in new and new[n] != old[n]}
        if edits:
            attributes[path] = edits
    computed = {
        name: buffer for name, buffer in base.named_buffers() if name not in base.state_dict()
    }
    keep = {
        name
        for name, buffer in computed.items()
        if name not in idle
        and (name in shapes or name in persistent or _differ(buffer, target[name]))
    }
    return Patch(shapes=shapes, attributes=attributes, persistent=sorted(keep))


def _differ(base: torch.Tensor, slim: torch.Tensor) -> bool:
    return not base.is_meta and not torch.equal(base, slim)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that may be sizes or factors: numbers, and lists of numbers."""
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training"
        and not name.startswith("_")
        and all(
            isinstance(item, (int, float))
            for item in (value if isinstance(value, (list, tuple)) else [value])
        )
    }
