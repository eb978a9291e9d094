"""The state of a pruner as JSON values, for checkpoints that hold nothing else beside weights.

What is pruned and what is 0 are the same nearly everywhere. So a mask is told by where the two
differ, which takes next to no space, and by a digest, since other weights would give another mask.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.training.core.processes import is_shared
from graphprune.training.schedule.packed import pack


def to_text(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A state as JSON values. One process can do it alone, also of weights that many share.

    Args:
        state: as `GradualPruner.state_dict` gives it.
        module: the module, with the weights that are saved beside the state.
    """
    masks = {}
    for name, packed in state["masks"].items():
        weight = module.get_parameter(name)
        beside = not is_shared(weight)
        told = packed ^ pack(weight == 0) if beside else packed
        text = base64.b64encode(zlib.compress(told.numpy().tobytes(), 6)).decode()
        masks[name] = {"beside zeros": beside, "bits": text, "digest": _digest(packed)}
    return {**state, "masks": masks}


def from_text(text: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The state that `to_text` was given.

    Raises:
        TrainingError: the module has other weights than those that were saved with it.
    """
    masks = {}
    for name, told in text["masks"].items():
        found = bytearray(zlib.decompress(base64.b64decode(told["bits"])))
        packed = torch.frombuffer(found, dtype=torch.uint8)
        if told["beside zeros"]:
            packed = _apart(packed, name, module)
        if _digest(packed) != told["digest"]:
            raise _others(name)
        masks[name] = packed
    return {**text, "masks": masks}


def _apart(told: Tensor, name: str, module: nn.Module) -> Tensor:
    weight = dict(module.named_parameters(remove_duplicate=False)).get(name)
    if weight is None or is_shared(weight):
        raise _others(name)
    zeros = pack(weight == 0)
    if zeros.shape != told.shape:
        raise _others(name)
    return told ^ zeros


def _digest(packed: Tensor) -> str:
    return hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16]


def _others(name: str) -> TrainingError:
    return TrainingError(
        "the saved masks don't belong to these weights",
        where=name,
        why="the weights are not those that were saved together with the masks",
        hint="resume from a checkpoint as it was written, in the way in which it was trained",
    )
