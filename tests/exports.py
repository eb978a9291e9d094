"""Exports of the same tiny model, done once: torch.export takes nearly all the time of a trace.

The graph doesn't depend on the weights, which each program gets from its own module. Tests of what
becomes of a model share these; those of tracing itself, of rules and of kinds of models (`ALONE`)
have each its own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

ALONE = tuple(f"tests/{name}/" for name in ("frontends", "ops", "properties", "regressions", "zoo"))
"""Folders of tests whose exports nobody shares."""

MOST = 100
"""Exports that are kept."""

PATHS = ("_name_or_path", "name_or_path")
SCALARS = (bool, int, float, str, type(None), torch.dtype)


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
            made[key] = _without_tensors(exported)
            if len(made) > MOST:
                del made[next(iter(made))]
        return exported

    return exports


def _without_tensors(exported: ExportedProgram) -> ExportedProgram:
    bare = copy.copy(exported)
    bare._state_dict = dict.fromkeys(exported.state_dict)
    bare._constants = dict.fromkeys(exported.constants)
    bare._example_inputs = None
    return copy.deepcopy(bare)


def _with_tensors(bare: ExportedProgram, module: nn.Module, example: Any) -> ExportedProgram:
    exported = copy.deepcopy(bare)
    tensors = dict(_tensors(module))
    exported._state_dict = {name: tensors[name] for name in bare.state_dict}
    exported._constants = {name: tensors[name] for name in bare.constants}
    exported._example_inputs = example
    return exported


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _key(module: nn.Module, args: Any, kwargs: Any, options: Any) -> Hashable:
    """All that a graph depends on; None where that isn't known."""
    parts: list[Hashable] = [repr(module), repr(options)]
    for name, part in module.named_modules():
        attributes = vars(part)
        own = name and "forward" in attributes
        if own or part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            return None
        parts += [
            name,
            type(part),
            *((k, v) for k, v in attributes.items() if k not in PATHS and isinstance(v, SCALARS)),
        ]
        if "config" in attributes:
            config = vars(attributes["config"]).items()
            parts += [(k, repr(v)) for k, v in config if k not in PATHS]
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
            parts.append((leaf.shape, leaf.stride(), leaf.dtype, repr(leaf.tolist())))
        elif isinstance(leaf, SCALARS):
            parts.append(leaf)
        else:
            return None
    return tuple(parts)
