"""Sums of losses over tokens; whoever adds them up divides by the number of all tokens once.

They are computed in float32, or in float64 where the model computes in that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OUT = -100
"""The label of what doesn't count."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of labels; 0 where no label counts.

    Args:
        logits: ``[tokens, classes]``.
        labels: int64 ``[tokens]``; `OUT` doesn't count.
    """
    return F.cross_entropy(_wide(logits), labels, ignore_index=OUT, reduction="sum")


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of ``T² KL(teacher || student)``, each a sum over the vocabulary.

    Args:
        student: logits ``[tokens, classes]``.
        teacher: logits of the same shape.
        temperature: T, which both are divided by.
    """
    ours = F.log_softmax(_wide(student) / temperature, -1)
    theirs = F.log_softmax(_wide(teacher) / temperature, -1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)


def square_head(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of ``||s - t||² / ||t||²``.

    Each token has its own scale: a token with a huge value, as language models have, would decide a
    mean of squares alone.

    Args:
        student: ``[tokens, width]``.
        teacher: of the same shape.
    """
    student, teacher = _wide(student), _wide(teacher)
    size = teacher.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((student - teacher).square().sum(-1) / size).sum()


def relative_error(student: Tensor, teacher: Tensor, variance: float) -> Tensor:
    """Sum over samples of the mean squared difference, in units of the teacher's variance.

    Args:
        student: ``[samples, ...]``.
        teacher: of the same shape.
        variance: of an element of the teacher's output over samples.
    """
    difference = (_wide(student) - _wide(teacher)).square()
    return difference.flatten(1).mean(1).sum() / variance


def _wide(x: Tensor) -> Tensor:
    """In float32, or what is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


Part = Callable[[Tensor, slice], Tensor]
"""The loss of some rows of logits ``[rows, classes]``, and which rows they are."""


def summed(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, part: Part, size: int
) -> Tensor:
    """The loss of many rows, with the logits of a few of them in memory at a time.

    The gradient of each part is taken as soon as its loss is there, so that neither logits nor what
    the loss needs of them is kept until the backward pass.

    Args:
        rows: logits ``[rows, classes]``, or with `weight` what is multiplied by it.
        weight: ``[classes, width]`` of the last layer.
        bias: ``[classes]`` of the last layer.
        part: the loss of some rows.
        size: rows at a time.
    """
    total: Tensor = _Summed.apply(rows, weight, bias, part, size)  # type: ignore[no-untyped-call]
    return total


def product_dtype(weight: Tensor) -> torch.dtype:
    """What a product with a weight is computed in."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        part: Part,
        size: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        given = (rows, weight, bias)
        gradients = [
            torch.zeros_like(x) if need and x is not None else None
            for x, need in zip(given, wanted, strict=True)
        ]
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        head = None if weight is None else _Head(weight, bias, *gradients[1:])
        for start in range(0, len(rows), size):
            place = slice(start, start + size)
            few = rows[place]
            logits = few.detach() if head is None else head.logits(few)
            with torch.set_grad_enabled(any(wanted)):
                loss = part(logits.requires_grad_(any(wanted)), place)
            total += loss.detach()
            if not any(wanted):
                continue
            (outer,) = torch.autograd.grad(loss, logits)
            if gradients[0] is not None:
                gradients[0][place] = outer if head is None else head.back(outer)
            if head is not None:
                head.add(outer, few)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        found = (None if g is None else g * outer[0] for g in ctx.saved_tensors)
        return (*found, None, None)


_BLOCK = 1 << 20
"""Elements of a product that are added to the gradient at a time: they stay in the cache."""


class _Head:
    """The last layer, converted once for all parts to what products are computed in.

    Its gradient is as large as the weight: products are added to one sum, in one place.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
    ) -> None:
        self.dtype = product_dtype(weight)
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.of_weight, self.of_bias = of_weight, of_bias

    def logits(self, rows: Tensor) -> Tensor:
        """``[rows, classes]``."""
        return F.linear(rows.detach().to(self.dtype), self.weight, self.bias)

    def back(self, outer: Tensor) -> Tensor:
        """The gradient of some rows."""
        return outer @ self.weight

    def add(self, outer: Tensor, rows: Tensor) -> None:
        """Add to the gradients of weight and bias."""
        if self.of_bias is not None:
            self.of_bias += outer.sum(0)
        if self.of_weight is None:
            return
        rows = rows.detach().to(self.dtype)
        some = max(1, _BLOCK // rows.shape[1])
        for sums, few in zip(
            torch.split(self.of_weight, some), torch.split(outer.T, some), strict=True
        ):
            sums += few @ rows
