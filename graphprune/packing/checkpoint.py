"""Hugging Face checkpoints with packed weights.

Configuration and tokenizer are the original checkpoint's. The weights are in
``packed.safetensors``, under which name transformers doesn't look for any: it would take the
layers that it doesn't find for new ones, and fill them with random numbers.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphprune.emit import pruned
from graphprune.emit.hf import COPIED, PLAN
from graphprune.errors import EmitError, LoadError
from graphprune.files import replacing
from graphprune.frontends.hf import checkpoint_class, construct, parameters_on_meta
from graphprune.frontends.weights import PACKED, map_checkpoint, read_packed
from graphprune.kernels.choose import DENSE, Table, choose
from graphprune.kernels.files import FORMATS, save
from graphprune.kernels.linear import SparseLinear
from graphprune.kernels.packed import FormatError, Packed
from graphprune.packing.report import Packing
from graphprune.packing.weights import AUTO, check_format, packed_weight

_COPIED = ("config.json", f"{pruned.FILE}.py", PLAN, *COPIED)


def pack_checkpoint(
    source: Path, output: Path, format: str, tokens: tuple[int, ...], progress: Any
) -> Packing:
    """See `graphprune.packing.pack`."""
    check_format(format)
    progress("reading the checkpoint")
    config, model_class = checkpoint_class(source)
    with torch.device("meta"):
        model = construct(model_class, config, source)
    linears = linear_weights(model)
    table = Table.usual() if format == AUTO else None
    layers, weights, before, after = [], {}, 0, 0
    state = map_checkpoint(source)
    for count, (name, tensor) in enumerate(state.items()):
        size = tensor.numel() * tensor.element_size()
        before += size
        packed = None
        if name in linears:
            progress(f"packing {name} ({count + 1}/{len(state)})")
            layer, packed = packed_weight(name, tensor, format, tokens, table)
            layers.append(layer)
            size = layer.bytes
        after += size
        weights[name] = tensor if packed is None else packed
    if not any(isinstance(w, Packed) for w in weights.values()):
        raise EmitError(
            "no weight becomes smaller",
            where=str(source),
            why="; ".join(sorted({f"{e.why}: {e.name}" for e in layers})[:3])
            or "the model has no linear layers whose weights are in the file",
            hint="pack what `graphprune compile --sparsify` wrote",
        )
    progress("writing")
    with replacing(output) as directory:
        directory.mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _COPIED):
                shutil.copyfile(file, directory / file.name)
        save(directory / PACKED, weights)
    return Packing(str(source), str(output), tuple(layers), before, after)


def linear_weights(model: nn.Module) -> dict[str, str]:
    """Weights of linear layers that belong to one layer only, to the names of the layers."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {
        f"{name}.weight": name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and uses[id(module.weight)] == 1
    }


def open_packed(
    path: Path, format: str, tokens: tuple[int, ...], device: torch.device, progress: Any
) -> nn.Module:
    """See `graphprune.runtime.model`."""
    check_format(format, (*FORMATS, AUTO, "file", DENSE))
    config, model_class = checkpoint_class(path)
    with parameters_on_meta():
        model = construct(model_class, config, path)
    linears = linear_weights(model)
    table = Table.usual() if format == AUTO else None
    state: Mapping[str, Tensor | Packed] = (
        read_packed(path) if (path / PACKED).is_file() else map_checkpoint(path)
    )
    rest: dict[str, Tensor] = {}
    for count, (name, weight) in enumerate(state.items()):
        if name not in linears:
            rest[name] = weight if isinstance(weight, Tensor) else weight.unpack()
            continue
        progress(f"opening {name} ({count + 1}/{len(state)})")
        dense = (weight if isinstance(weight, Tensor) else weight.unpack()).to(device)
        chosen = _layout(weight, dense, format, tokens, table)
        layer = model.get_submodule(linears[name])
        if isinstance(chosen, Tensor):
            rest[name] = chosen
        else:
            assert isinstance(layer, nn.Linear)
            _set(model, linears[name], SparseLinear(chosen, layer.bias))
    _fill(model, rest, path)
    model.to(device)
    return model.eval()


def _layout(
    weight: Tensor | Packed, dense: Tensor, format: str, tokens: tuple[int, ...], table: Any
) -> Tensor | Packed:
    """A weight in the format that is asked for; dense where that can't hold it."""
    if format == "file":
        return dense if isinstance(weight, Tensor) else weight
    if not dense.is_floating_point() or format == DENSE:
        return dense
    if format == AUTO:
        # Nothing is gained without zeros, and measuring costs time.
        few = int(dense.count_nonzero()) > 0.7 * dense.numel()
        format = DENSE if few else choose(dense, tokens, table=table)
    if format == DENSE:
        return dense
    try:
        return FORMATS[format].pack(dense)
    except FormatError:
        return dense


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


def _fill(model: nn.Module, rest: Mapping[str, Tensor], path: Path) -> None:
    """Put in what isn't packed, and see that nothing is left without a value."""
    found = model.load_state_dict(rest, strict=False, assign=True)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    empty = [n for n, p in model.named_parameters() if p.is_meta]
    empty += [n for n, b in model.named_buffers() if b.is_meta]
    if empty or found.unexpected_keys:
        name = empty[0] if empty else found.unexpected_keys[0]
        raise LoadError(
            "the packed weights don't fit the model",
            where=name,
            why="it is missing" if empty else "the model has no such weight",
            hint=f"pack the original checkpoint again; {path} was written for another model",
        )
