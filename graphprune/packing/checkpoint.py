"""Hugging Face checkpoints with packed weights.

Configuration and tokenizer are the original checkpoint's. The weights are in
``packed.safetensors``, under which name transformers doesn't look for any: it would take the
layers that it doesn't find for new ones, and fill them with random numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.pytorch_utils import Conv1D

from graphprune.checkpoints import self_contained
from graphprune.checkpoints.shards import PACKED, has_weights
from graphprune.checkpoints.weights import (
    FLATTENED,
    TURNED,
)
from graphprune.emit.companions import copy_code, copy_companions
from graphprune.emit.hf import PLAN
from graphprune.errors import EmitError, LoadError
from graphprune.exclusive import one_at_a_time
from graphprune.files import Claim
from graphprune.files.refusals import check_space
from graphprune.frontends.hf.load import build, checkpoint_class
from graphprune.kernels.choose import Table
from graphprune.kernels.formats.files import save
from graphprune.kernels.formats.packed import Packed
from graphprune.packing.report import Packing
from graphprune.packing.weights import packed_tensor, packed_weight
from graphprune.progress import Part
from graphprune.runtime.formats import AUTO, check_format
from graphprune.runtime.packed import check_plain, linear_weights, state_of

_COPIED = ("config.json", f"{self_contained.FILE}.py", PLAN)


@one_at_a_time
def pack_checkpoint(
    source: Path,
    output: Path,
    claim: Claim,
    format: str,
    tokens: tuple[int, ...],
    progress: Any,
    *,
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> Packing:
    """See `graphprune.packing.pack`; the output is written by its claim."""
    check_format(format)
    progress("reading the checkpoint")
    config, model_class = checkpoint_class(source, trust=trust)
    check_plain(config, source)
    if not has_weights(source):
        raise LoadError(
            "the checkpoint has no safetensors files",
            where=str(source),
            hint="save the model with save_pretrained(..., safe_serialization=True)",
        )
    model, _ = build(source, config, model_class, allow_unused_weights=allow_unused_weights)
    linears = linear_weights(model)
    across = {n for n, m in linears.items() if isinstance(model.get_submodule(m), Conv1D)}
    table = Table.usual() if format == AUTO else None
    layers, weights, before, after = [], {}, 0, 0
    flattened: dict[str, list[int]] = {}
    state, done = state_of(model), 0
    total = len(linears.keys() & state.keys())
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        before += size
        packed = None
        if name in linears:
            done += 1
            progress(Part("packing", done, total, rest=f", {name}"))
            matrix = tensor.T if name in across else tensor
            layer, packed = packed_weight(name, matrix, format, tokens, table)
            layers.append(layer)
            size = layer.bytes
        elif tensor.dim() > 1:
            layer, packed = packed_tensor(name, tensor)
            if packed is not None:
                layers.append(layer)
                flattened[name] = list(tensor.shape)
                size = layer.bytes
        after += size
        weights[name] = tensor if packed is None else packed
    if not any(isinstance(w, Packed) for w in weights.values()):
        raise EmitError(
            "no weight becomes smaller",
            where=str(source),
            why="; ".join(sorted({f"{e.why}: {e.name}" for e in layers})[:3])
            or "no weight has enough zeros",
            hint="pack what `graphprune compile --sparsify` wrote",
        )
    progress("writing")
    check_space(output, after)
    with claim.writing() as directory:
        directory.mkdir()
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        copy_companions(source, directory)
        if trust:
            copy_code(source, directory)
        turned = [n for n, w in weights.items() if isinstance(w, Packed) and n in across]
        notes = {TURNED: turned, FLATTENED: flattened}
        save(directory / PACKED, weights, {k: json.dumps(v) for k, v in notes.items() if v})
        # safetensors lets the owner alone read it.
        shutil.copymode(directory / "config.json", directory / PACKED)
        progress("putting the files in place")
    return Packing(str(source), str(output), tuple(layers), before, after)
