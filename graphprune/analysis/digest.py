"""Hashes of weights that cost little, to tell models of one shape apart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.checkpoints.memory import page_out

_SAMPLED = 256


def weights_digest(program: BaseProgram) -> str:
    """A hash of some elements of every weight, spread over all of it."""
    digest = hashlib.sha256()
    for name in sorted(program.trainable):
        weight = program.weights[name].detach()
        flat = weight.flatten()
        sampled = flat[:: max(len(flat) // _SAMPLED, 1)]
        digest.update(f"{name} {flat.dtype}".encode() + raw_bytes(sampled))
        page_out(weight)
    return digest.hexdigest()[:16]


def flat_elements(x: Tensor) -> Tensor:
    """The elements of a tensor in order, as they lie in memory."""
    return x.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()


def raw_bytes(x: Tensor) -> bytes:
    """The elements of a tensor as they lie in memory."""
    flat = flat_elements(x)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
