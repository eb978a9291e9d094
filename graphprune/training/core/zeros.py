"""Zeros whose bits are zero."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""


def fill_zeros(x: Tensor, kept: Tensor) -> None:
    """Put +0.0 into a tensor, and leave the bits of everything else.

    A product with a mask would leave -0.0 and NaN, and `Tensor.masked_fill_` takes seven times as
    long on a CPU.

    Args:
        x: any numbers of at most eight bytes; changed in place, unseen by gradients.
        kept: bool of the same shape, False where a zero is to be.
    """
    bits = x.detach().view(_BITS[x.element_size()])
    bits.bitwise_and_(-kept.view(torch.int8))  # all bits, or none
