"""Matrix products as exact as their types."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BACKENDS: Any = torch.backends  # whose modules make their attributes as they are asked for
_PRODUCTS = (_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul)
_CONVOLUTIONS = (_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)
_EXACT = ("ieee", "none")


@contextmanager
def exact() -> Iterator[None]:
    """Products of float32 in float32: no TF32 or bf16 inside, whatever the process has set.

    Hessians are ill-conditioned; ten bits of mantissa are not enough for their factors.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for single backends, with which this setting doesn't mix
        with _ieee(_PRODUCTS):
            yield
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact_everywhere() -> Iterator[None]:
    """Convolutions, too, which on CUDA are computed in TF32 unless somebody says otherwise."""
    with exact(), _ieee(_CONVOLUTIONS):
        yield


@contextmanager
def _ieee(kinds: Sequence[Any]) -> Iterator[None]:
    """Compute some kinds of operators, as `torch.backends` has their settings, in float32."""
    before = [(kind, kind.fp32_precision) for kind in kinds]
    changed = [(kind, value) for kind, value in before if value not in _EXACT]
    for kind, _ in changed:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, value in changed:
            kind.fp32_precision = value


def inner(a: Tensor, b: Tensor) -> float:
    """Sum of a * b for two matrices: rows in their type, in blocks, and the rows' sums in float64.

    A sum in float64 throughout would first copy the whole matrix into it.
    """
    return float((a * b).sum(1).sum(dtype=torch.float64))


def finite(x: Tensor) -> bool:
    """Whether no element of a floating-point tensor is NaN or infinite."""
    x = x.detach()
    if x.numel() == 0 or math.isfinite(float(x.sum())):  # what isn't makes the sum so
        return True
    return all(math.isfinite(float(v)) for v in torch.aminmax(x))  # finite ones may do so as well


def true_count(mask: Tensor) -> int:
    """How many elements of a bool tensor are True; NumPy takes a fifth of torch's time."""
    if mask.device.type == "cpu" and mask.is_contiguous():
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.count_nonzero())
