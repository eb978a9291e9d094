"""Masks as bits: eight weights a byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import TrainingError


def pack(mask: Tensor) -> Tensor:
    """A mask as bytes, uint8 ``[ceil(n / 8)]``; the first weight is the highest bit."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack(packed: Tensor, shape: torch.Size, name: str) -> Tensor:
    """The mask that `pack` was given.

    Args:
        packed: its bytes.
        shape: the mask's.
        name: of its parameter, for what goes wrong.

    Raises:
        TrainingError: it is a mask of another shape.
    """
    count = shape.numel()
    if packed.numel() != -(-count // 8):
        raise TrainingError(
            "a saved mask doesn't fit its parameter",
            where=name,
            why=f"{8 * packed.numel():,} bits for {count:,} weights",
            hint="go on with the model that it was saved of",
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)
