"""Exports of the same tiny model, done once: torch.export takes nearly all the time of a trace.

The graph doesn't depend on the weights, which each program gets from its own module. Tests of what
becomes of a model share these; those of tracing itself and of rules (`ALONE`) have each its own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

ALONE = tuple(f"tests/{name}/" for name in ("frontends", "ops", "properties", "regressions"))
"""Folders of tests whose exports nobody shares."""

MOST = 300
"""Exports that are kept."""

OTHERWISE = ("_parameters", "_buffers", "_modules", "config", "forward", "name_or_path")
"""Attributes of modules that are looked at otherwise, or not at all."""

PLAIN = (list, tuple, dict, set, frozenset)


def shared(export: Callable[..., ExportedProgram]) -> Callable[..., ExportedProgram]:
    """`torch.export.export` that knows what it has exported, but for the tests of `ALONE`."""
    made: dict[Hashable, ExportedProgram] = {}

    def exports(module: nn.Module, args: Any, kwargs: Any = None, **options: Any) -> Any:
        if os.environ.get("PYTEST_CURRENT_TEST", "").startswith(ALONE):
            return export(module, args, kwargs, **options)
        key = _key(module, args, kwargs, options)
        if key is not None and key in made:
            return _with_tensors(made[key], module, (args, kwargs or {}))
        exported = export(module, args, kwargs, **options)
        if key is not None and exported.constants.keys() <= dict(module.named_buffers()).keys():
            bare = _without_tensors(exported)
            if _names(bare) == _names(exported):  # copies have another for `input`, a builtin
                made[key] = bare
            if len(made) > MOST:
                del made[next(iter(made))]
        return exported

    return exports


def _without_tensors(exported: ExportedProgram) -> ExportedProgram:
    bare = copy.copy(exported)
    bare._state_dict = cast("Any", dict.fromkeys(exported.state_dict))
    bare._constants = cast("Any", dict.fromkeys(exported.constants))
    bare._example_inputs = None
    return copy.deepcopy(bare)


def _with_tensors(bare: ExportedProgram, module: nn.Module, example: Any) -> ExportedProgram:
    exported = copy.deepcopy(bare)
    tensors = dict(_tensors(module))
    exported._state_dict = {name: tensors[name] for name in bare.state_dict}
    exported._constants = {name: tensors[name] for name in bare.constants}
    exported._example_inputs = example
    return exported


def _names(exported: ExportedProgram) -> list[str]:
    return [node.name for node in exported.graph.nodes]


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _key(module: nn.Module, args: Any, kwargs: Any, options: Any) -> Hashable:
    """All that a graph depends on; None where that isn't known."""
    parts: list[Hashable] = [repr(options)]
    for name, part in module.named_modules():
        attributes = vars(part)
        if not _is_own(attributes.get("forward"), part):
            return None
        parts += [name, cast("Hashable", type(part))]
        parts += [(k, _told(v)) for k, v in attributes.items() if k not in OTHERWISE]
        if "config" in attributes:
            config = vars(attributes["config"]).items()
            parts += [(k, repr(v)) for k, v in config if k != "_name_or_path"]
    first: dict[int, str] = {}
    for name, tensor in _tensors(module):
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            return None
        sizes = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        parts.append((name, first.setdefault(id(tensor), name), tensor.requires_grad, *sizes))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    parts.append(str(spec))
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if leaf.is_meta:
                return None
            parts.append((leaf.shape, leaf.stride(), leaf.dtype, repr(leaf.tolist())))
        else:
            parts.append(_told(leaf))
    return tuple(parts)


def _told(value: Any) -> Hashable:
    """Equal for two objects only if either will do: most are equal to nothing but themselves."""
    if isinstance(value, PLAIN):
        return repr(value)
    return (type(value), value) if isinstance(value, Hashable) else repr(value)


def _is_own(forward: Any, part: nn.Module) -> bool:
    """Whether a module computes what its class says, in a wrapper that keeps the main outputs."""
    if forward is None:
        return True
    method = getattr(getattr(forward, "__wrapped__", None), "__func__", None)
    return method is type(part).forward and forward.__name__ == "forward"
