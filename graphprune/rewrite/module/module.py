"""The slim model as a module of the original class."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from graphprune.checkpoints.patch import (
    Patch,
    apply_patch,
    difference,
    named_tensors,
    owner_of,
    skeleton,
    slim_name,
)
from graphprune.errors import EmitError
from graphprune.exclusive import one_at_a_time
from graphprune.rewrite.config.trials import Check
from graphprune.rewrite.module.attributes import find_patch
from graphprune.rewrite.module.judge import Judge

CALLER = 5
"""Frames from `build` to the code that asked for `Slim.module`, a cached property."""


@one_at_a_time
def build(slim: Any) -> nn.Module:
    """Build the slim model as a module.

    Args:
        slim: A :class:`graphprune.rewrite.slim.Slim`.

    Returns:
        A resized copy of the source module, with its class and signature. Where there is none
        (the source is a graph) or none can be found (with a warning): the slim graph as a module.
    """
    if slim.program.module is not None:
        name = type(slim.program.module).__name__
        try:
            return _resized(slim)
        except EmitError as error:
            what = error.what[:1].lower() + error.what[1:].rstrip(".")
            where = f" ({error.where})" if error.where else ""
            warnings.warn(
                f"the slim module is the exported graph instead of {name}: {what}{where}",
                stacklevel=CALLER,
            )
    module: nn.Module = slim.exported.module()
    return module


def _resized(slim: Any) -> nn.Module:
    """Find the patch, running candidates against the slim graph, and apply it.

    Raises:
        EmitError: There is no such patch.
    """
    program = slim.program
    dropped = slim.dropped_layers()
    if slim.lost_branches:
        raise EmitError(
            "No size of the class leaves out one branch of a layer.",
            where=", ".join(slim.lost_branches),
        )
    blank = skeleton(program.module)
    _refill(blank, program)
    buffers = {
        name: buffer
        for old, buffer in program.module.named_buffers(remove_duplicate=False)
        if (name := slim_name(old, dropped)) is not None
    }

    judge: Judge = slim.judge

    def filled(candidate: nn.Module) -> nn.Module:
        if any(tensor.is_meta for _, tensor in named_tensors(candidate)):
            assign(candidate, slim.weights, buffers)
        return candidate

    def check(candidate: nn.Module) -> bool:
        return judge.accepts(filled(candidate))

    def strict(candidate: nn.Module) -> bool:
        return check(candidate) and _plainly(candidate, check)

    module: nn.Module | None = None
    failure: EmitError | None = None
    for config, native in _configs(slim):
        find = partial(find_patch, blank, slim.shapes, dropped, slim.size_hints(), config=config)
        try:
            module = filled(_native_sizes(_applied(blank, find(check)), native, check))
        except EmitError as error:
            failure = failure or error
            continue
        if not _plainly(module, check):
            # Some size that fused attention doesn't read is wrong.
            with suppress(EmitError):
                module = _native_sizes(_applied(blank, find(strict)), native, strict)
        if native is None or not difference(native, module).attributes:
            break
        # Loading this config would give other factors: better a stale config than a wrong one.
    if module is None:
        assert failure is not None
        raise failure
    dense = {
        t.untyped_storage().data_ptr() for _, t in named_tensors(program.module) if not t.is_meta
    }
    assign(module, slim.weights, buffers, dense)
    return module


def _applied(blank: nn.Module, patch: Patch) -> nn.Module:
    module = skeleton(blank)
    apply_patch(module, patch)
    return module


def _native_sizes(module: nn.Module, native: nn.Module | None, check: Check) -> nn.Module:
    """The module with the sizes that the native one has, where that is as right.

    What one run doesn't read (heads per group, in fused attention) another may.
    """
    if native is None:
        return module
    sizes = {
        path: {name: value for name, value in edits.items() if type(value) is int}
        for path, edits in difference(module, native).attributes.items()
    }
    changed = _applied(module, Patch(attributes=sizes))
    try:
        return changed if check(changed) else module
    except Exception:  # anything that a model's code raises on wrong sizes
        return module


def _plainly(module: nn.Module, check: Check) -> bool:
    """Whether the outputs are right as well where attention isn't a fused operator.

    Decoding with a mask and exporting take that way through the code. True for models without it.
    """
    found: dict[int, Any] = {}
    for inner in module.modules():
        config: Any = getattr(inner, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            found[id(config)] = config
    for config in found.values():
        config._attn_implementation = "eager"
    try:
        return not found or check(module)
    except Exception:  # anything that a model's code raises on wrong sizes
        return False
    finally:
        for config in found.values():
            config._attn_implementation = "sdpa"


def _configs(slim: Any) -> Iterator[tuple[dict[str, Any], nn.Module | None]]:
    """Yield the edits of a Hugging Face config to try, each with the model that it gives.

    The native config comes first, since some modules read sizes from their config while they run.
    Then only those edits that removed layers ask for; these give no model.
    """
    source = slim.program.source
    if source is None:
        yield {}, None
        return
    # transformers is needed for its own models only, and slow to import.
    from graphprune.checkpoints.self_contained import original_class, plain
    from graphprune.rewrite.config.builds import build_on_meta
    from graphprune.rewrite.config.config import cut_layers, solve_config

    config = plain(source.config, source.model_class)
    model_class = original_class(source.model_class)
    dropped = slim.dropped_layers()
    shapes = {name: shape for name, shape in slim.shapes.items() if name not in slim.idle_buffers}
    solved = solve_config(config, model_class, shapes, dropped, slim.size_hints())
    if not solved.problems:
        yield dict(solved.edits), build_on_meta(model_class, solved.config)
    yield cut_layers(config, model_class, dropped), None


def assign(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    shared: Collection[int] = (),
) -> None:
    """Give a module on the meta device its tensors. Ties stay ties.

    Args:
        module: The module, of the right shapes.
        weights: Name to tensor.
        buffers: The buffers that no graph reads, and which are hence not among the weights.
        shared: Addresses of storages that others use: tensors in these are copied.

    Raises:
        EmitError: A tensor is missing or has another shape.
    """
    names: dict[int, list[str]] = {}
    tensors = dict(named_tensors(module))
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        old = tensors[tied[0]]
        source = next((s for s in (weights, buffers) for n in tied if n in s), None)
        if source is None:
            raise EmitError("The slim model lacks a tensor of the module.", where=tied[0])
        value = source[next(n for n in tied if n in source)].detach()
        if value.shape != old.shape:
            raise EmitError(
                "A tensor of the slim model doesn't fit the module.",
                where=tied[0],
                why=f"it has shape {tuple(value.shape)} instead of {tuple(old.shape)}",
            )
        if source is buffers or value.untyped_storage().data_ptr() in shared:
            value = value.clone()
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        for name in tied:
            owner, leaf = owner_of(module, name)
            setattr(owner, leaf, value)
    for name in weights.keys() - tensors.keys():  # constants that are plain attributes
        owner, leaf = owner_of(module, name)
        if isinstance(getattr(owner, leaf, None), torch.Tensor):
            setattr(owner, leaf, weights[name].detach().clone())


def _refill(blank: nn.Module, program: Any) -> None:
    """Put empty tensors back where the dense weights were let go of while they were cut."""
    made: dict[str, torch.Tensor] = {}
    for name, shape in program.parameters.items():
        owner, leaf = owner_of(blank, name)
        if owner is None:  # a constant of the graph
            continue
        key = program.aliases.get(name, name)
        empty = made.setdefault(key, torch.empty(shape, device="meta"))
        if owner._parameters.get(leaf, owner) is None:
            if not isinstance(empty, nn.Parameter):
                empty = made[key] = nn.Parameter(empty)
            owner._parameters[leaf] = empty
        elif owner._buffers.get(leaf, owner) is None:
            owner._buffers[leaf] = empty
