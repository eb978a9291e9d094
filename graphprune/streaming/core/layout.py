"""Layouts: how a stored weight is a stack of matrices, and an activation the rows they multiply.

Every layout gives weights the same form, ``[parts, out, in]``, and activations the form
``[tokens, in]`` for each part: a part is a group of a convolution or an expert.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Rows = Iterator[tuple[int, Tensor]]
"""Part and its rows ``[tokens, in]``, for every part, in order."""


class Layout(Protocol):
    """How a weight meets the activation that it is multiplied with."""

    @property
    def parts(self) -> int:
        """Number of matrices in the weight."""

    @property
    def gathering(self) -> Hashable:
        """Equal for two layouts that make the same rows of the same activation."""

    def rows(self, x: Tensor, chosen: Tensor | None, valid: Tensor | None) -> Rows:
        """The rows of an activation.

        Args:
            x: the activation.
            chosen: int ``[tokens]``, the expert of each row; None where there is no choice.
            valid: bool ``[tokens]``, which rows count; None for all.
        """

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as ``[parts, out, in]``; a view where that is possible."""

    def restored(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`; `shape` is that of the weight."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer.

    Attributes:
        transposed: whether the weight is stored as ``[in, out]``.
        features: the dimension of the activation that the weight sums over, -1 or -2.
    """

    transposed: bool = False
    features: int = -1

    @property
    def parts(self) -> int:
        """Number of matrices in the weight."""
        return 1

    @property
    def gathering(self) -> Hashable:
        """Equal for two layouts that make the same rows of the same activation."""
        return ("rows", self.features)

    def rows(self, x: Tensor, chosen: Tensor | None, valid: Tensor | None) -> Rows:
        """The rows of an activation."""
        yield 0, _valid(x.movedim(self.features, -1).reshape(-1, x.shape[self.features]), valid)

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as ``[parts, out, in]``; a view where that is possible."""
        return (weight.T if self.transposed else weight).unsqueeze(0)

    def restored(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`; `shape` is that of the weight."""
        return (matrices[0].T if self.transposed else matrices[0]).reshape(shape).contiguous()


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution: a row is the patch of the image under one position of the kernel.

    Attributes:
        kernel: size in every spatial dimension.
        stride: of the same length.
        padding: (before, after) of every spatial dimension.
        dilation: of the same length.
        groups: number of groups; each is a part.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def parts(self) -> int:
        """Number of matrices in the weight."""
        return self.groups

    @property
    def gathering(self) -> Hashable:
        """Equal for two layouts that make the same rows of the same activation."""
        return self

    def rows(self, x: Tensor, chosen: Tensor | None, valid: Tensor | None) -> Rows:
        """See `Layout`; a patch has its channels first, as a kernel has."""
        rank = len(self.kernel)
        if x.dim() == rank + 1:
            x = x.unsqueeze(0)
        around = [size for pair in reversed(self.padding) for size in pair]
        width = x.shape[1] // self.groups
        for part in range(self.groups):
            patches = x[:, part * width : (part + 1) * width]
            if any(around):
                patches = torch.nn.functional.pad(patches, around)
            for dim, (k, s, d) in enumerate(
                zip(self.kernel, self.stride, self.dilation, strict=True), start=2
            ):
                patches = patches.unfold(dim, (k - 1) * d + 1, s)[..., ::d]
            # [batch, channels, *positions, *kernel]
            patches = patches.movedim(1, rank + 1)
            yield part, _valid(patches.reshape(-1, width * math.prod(self.kernel)), valid)

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as ``[parts, out, in]``; a view where that is possible."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def restored(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`; `shape` is that of the weight."""
        return matrices.reshape(shape).contiguous()


@dataclass(frozen=True, slots=True)
class Experts:
    """A stack of matrices of which every row has chosen one: ``weight[chosen] @ row``.

    Attributes:
        experts: how many.
        transposed: whether the weight is stored as ``[experts, in, out]``.
        left: whether the weight is the left operand of the product.
    """

    experts: int
    transposed: bool
    left: bool

    @property
    def parts(self) -> int:
        """Number of matrices in the weight."""
        return self.experts

    @property
    def gathering(self) -> Hashable:
        """Equal for two layouts that make the same rows of the same activation."""
        return ("experts", self.experts)

    def rows(self, x: Tensor, chosen: Tensor | None, valid: Tensor | None) -> Rows:
        """The rows of an activation."""
        assert chosen is not None
        flat = x.reshape(chosen.shape[0], -1)
        for expert in range(self.experts):
            own = chosen == expert
            yield expert, flat[own if valid is None else own & valid]

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as ``[parts, out, in]``; a view where that is possible."""
        return weight.transpose(1, 2) if self.transposed else weight

    def restored(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`; `shape` is that of the weight."""
        return self.matrices(matrices).reshape(shape).contiguous()

    def product(self, weight: Tensor, chosen: Tensor, x: Tensor) -> Tensor:
        """What the graph computes of all chosen matrices, with one in memory at a time.

        Args:
            weight: as stored; each matrix is brought to the dtype and the device of `x`.
            chosen: int ``[tokens]``.
            x: ``[tokens, in, 1]``, or ``[tokens, 1, in]`` where the weight is at the right.

        Returns:
            ``[tokens, out, 1]`` or ``[tokens, 1, out]``.
        """
        flat = x.flatten(1)
        matrices = self.matrices(weight)
        result = flat.new_empty(len(flat), matrices.shape[1])
        for expert in sorted(set(chosen.tolist())):
            own = chosen == expert
            result[own] = flat[own] @ matrices[expert].to(x).T
        return result.unsqueeze(-1 if self.left else 1)


@dataclass(frozen=True, slots=True)
class Bank:
    """A stack of matrices, each with rows of its own: a batched product.

    Attributes:
        size: number of matrices.
        transposed: whether the weight is stored as ``[matrices, in, out]``.
        features: the dimension of the activation that the weight sums over, -1 or -2.
    """

    size: int
    transposed: bool
    features: int

    @property
    def parts(self) -> int:
        """Number of matrices in the weight."""
        return self.size

    @property
    def gathering(self) -> Hashable:
        """Equal for two layouts that make the same rows of the same activation."""
        return ("bank", self.size, self.features)

    def rows(self, x: Tensor, chosen: Tensor | None, valid: Tensor | None) -> Rows:
        """The rows of an activation."""
        yield from enumerate(x.movedim(self.features, -1))

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as ``[parts, out, in]``; a view where that is possible."""
        return weight.transpose(1, 2) if self.transposed else weight

    def restored(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`; `shape` is that of the weight."""
        return self.matrices(matrices).reshape(shape).contiguous()


def _valid(rows: Tensor, valid: Tensor | None) -> Tensor:
    return rows if valid is None else rows[valid]
