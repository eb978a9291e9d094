"""Sums of a per-element salience over all dimensions of a tensor but one, in one pass.

A weight is read once, in pieces that stay in the processor's cache, whatever number of its
dimensions is wanted; no copy of it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

import numpy as np
import torch

from graphprune.plan.units import FloatArray

Salience: TypeAlias = Callable[..., torch.Tensor]

PIECE = 1 << 18  # elements: 1 MiB of float32


def marginals(
    tensors: tuple[torch.Tensor, ...], salience: Salience, dims: Collection[int]
) -> dict[int, FloatArray]:
    """Reduce ``salience(*tensors)`` to one vector per dimension.

    Args:
        tensors: of one shape; half precision is widened to float32 piece by piece.
        salience: element by element, from pieces of `tensors` to a tensor ``>= 0`` that isn't one
            of them; it may overwrite what it gave before.
        dims: the dimensions wanted, at least one; a scalar counts as one dimension of size 1.

    Returns:
        For each of `dims` a float64 vector with the sum over all other dimensions. Pieces are
        summed in the tensors' precision, at least float32, and added up in float64.
    """
    tensors = tuple(t.detach().reshape(t.shape or (1,)) for t in tensors)
    shape = tensors[0].shape
    row = int(np.prod(shape[1:]))
    if len(shape) > 2 and row > PIECE:
        return _by_slices(tensors, salience, dims)
    length = max(1, PIECE // max(1, row))
    device = tensors[0].device
    rows = torch.zeros(shape[0], dtype=torch.float64, device=device)
    columns = torch.zeros(row, dtype=torch.float64, device=device)
    want_rows, want_columns = 0 in dims, any(dims)
    for start in range(0, shape[0], length):
        piece = salience(*(_wide(t[start : start + length]) for t in tensors)).reshape(-1, row)
        if want_rows:
            rows[start : start + length] = piece.sum(1)
        if want_columns:
            columns += piece.sum(0)
    rest = columns.view(shape[1:])
    return {
        d: rows.cpu().numpy() if d == 0 else _others_summed(rest, d - 1).cpu().numpy() for d in dims
    }


def _by_slices(
    tensors: tuple[torch.Tensor, ...], salience: Salience, dims: Collection[int]
) -> dict[int, FloatArray]:
    """`marginals` of a stack of large tensors, such as the weights of experts."""
    inner = [d - 1 for d in dims if d] or [0]
    result = {d: np.zeros(tensors[0].shape[d]) for d in dims}
    for i in range(tensors[0].shape[0]):
        part = marginals(tuple(t[i] for t in tensors), salience, inner)
        for d, total in result.items():
            if d == 0:
                total[i] = part[inner[0]].sum()
            else:
                total += part[d - 1]
    return result


def _wide(piece: torch.Tensor) -> torch.Tensor:
    return piece.to(torch.promote_types(piece.dtype, torch.float32))


def _others_summed(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    others = [d for d in range(tensor.dim()) if d != dim]
    return tensor.sum(others) if others else tensor
