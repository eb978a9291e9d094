"""Matrix products as exact as their types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact() -> Iterator[None]:
    """Products of float32 in float32: no TF32 or bf16 inside, whatever the process has set.

    Hessians are ill-conditioned; ten bits of mantissa are not enough for their factors.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
