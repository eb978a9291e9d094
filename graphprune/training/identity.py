"""What a training run is, so that another one can't go on from its state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.analysis.digest import raw_bytes, weights_digest
from graphprune.ir.torch.program import Program
from graphprune.training.core.options import Training
from graphprune.training.core.samples import Samples
from graphprune.training.state import VERSION


def identity(
    base: Program | nn.Module,
    teacher: Program | nn.Module | None,
    masks: Mapping[str, Tensor],
    samples: Samples,
    training: Training,
    loss: Any,
    part: tuple[float, float],
    world: int,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """The parts of a run's identity, as JSON values.

    `callbacks` are the identities of what takes part in it beside the weights.
    """
    options = {**asdict(training), "own loss": None if loss is None else _named(loss)}
    return {
        "version": VERSION,
        "base": model_digest(base),
        "teacher": None if teacher is None else model_digest(teacher),
        "masks": _masks_digest(masks),
        "data": samples.digest(),
        "training": json.loads(json.dumps(options)),
        "part": list(part),
        "processes": world,
        "callbacks": json.loads(json.dumps(list(callbacks))),
    }


def model_digest(model: Program | nn.Module) -> str:
    """Equal for models that compute the same with equal weights."""
    if isinstance(model, Program):
        code = hashlib.sha256(model.code().encode()).hexdigest()[:16]
        return f"{model.fingerprint}-{code}-{weights_digest(model)}"
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + raw_bytes(tensor))
    return digest.hexdigest()[:16]


def _masks_digest(masks: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode() + raw_bytes(masks[name].to(torch.bool).view(torch.uint8)))
    return digest.hexdigest()[:16]


def _named(loss: Any) -> str:
    return f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss).__name__)}"
