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
        leaves = [None if x is None else x.detach() for x in (weight, bias)]
        for leaf, need in zip(leaves, wanted[1:], strict=True):
            if leaf is not None:
                leaf.requires_grad_(need)
        head, shift = leaves
        for start in range(0, len(rows), size):
            place = slice(start, start + size)
            with torch.set_grad_enabled(any(wanted)):
                few = rows[place].detach().requires_grad_(wanted[0])
                logits = few if head is None else F.linear(few, head, shift)
                loss = part(logits, place)
            total += loss.detach()
            pairs = zip((few, head, shift), gradients, strict=True)
            asked = [x for x, g in pairs if x is not None and g is not None]
            found = iter(torch.autograd.grad(loss, asked) if asked else ())
            if gradients[0] is not None:
                gradients[0][place] = next(found)
            for gradient in gradients[1:]:
                if gradient is not None:
                    gradient += next(found)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        found = (None if g is None else g * outer[0] for g in ctx.saved_tensors)
        return (*found, None, None)
