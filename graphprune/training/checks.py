"""What is checked, and found out, of a model before its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.training.core.samples import Feed, Micro, Samples
from graphprune.training.model.calls import call, first_output, logits_in_parts
from graphprune.training.model.student import Student

TOLERANCE = 1e-5
"""Largest relative difference between two forms of one model in float32."""

_SEEN = 64
"""Samples that the variance of a teacher's output is taken over."""


def check_same(before: Tensor | None, after: Tensor | None, what: str, hint: str) -> None:
    """Make sure that two forms of a model compute the same.

    Raises:
        TrainingError: they don't.
    """
    if before is None or after is None:
        return
    wide = [x.double() for x in (before, after)]
    size = float(wide[0].abs().max()) if before.numel() else 0.0
    difference = float((wide[0] - wide[1]).abs().max()) if before.numel() else 0.0
    if not difference <= TOLERANCE * max(size, 1.0):
        raise TrainingError(
            f"the model computes something else {what}",
            why=f"the largest difference is {difference:.3g}, where values reach {size:.3g}",
            hint=hint,
        )


@torch.no_grad()
def keeps_head(student: Student, micro: Micro) -> bool:
    """Whether the logits are what the last layer makes of what it reads, and nothing else."""
    if student.head is None:
        return False
    whole = first_output(call(student, micro))
    rows, weight, bias = logits_in_parts(student, micro)
    if weight is None or rows.shape[:-1] != whole.shape[:-1] or rows.shape[-1] != weight.shape[-1]:
        return False
    made = nn.functional.linear(rows, weight, bias)
    return bool(torch.allclose(made, whole, rtol=TOLERANCE, atol=TOLERANCE))


@torch.no_grad()
def predicts_next(student: Student, micro: Micro) -> bool:
    """Whether logits come with every token, and don't depend on those after it."""
    tokens = micro.tokens
    if tokens is None or tokens.shape[1] < 2:
        return False
    before = first_output(call(student, micro))
    if before.shape[:-1] != tokens.shape:
        return False
    other = tokens.clone()
    other[:, -1] = torch.where(tokens[:, -1] == 0, 1, 0)
    after = first_output(call(student, _with_tokens(micro, other)))
    return bool(torch.allclose(before[:, :-1], after[:, :-1], rtol=1e-3, atol=1e-3))


@torch.no_grad()
def variance(teacher: Student, samples: Samples, feed: Feed, device: torch.device) -> float:
    """The mean variance of an element of a teacher's output over samples.

    Raises:
        TrainingError: all outputs are the same.
    """
    seen: list[Tensor] = []
    for number in range(min(len(samples), _SEEN)):
        micro = feed(samples.take([number])).to(device)
        output = first_output(call(teacher, micro)).double()
        if micro.valid is not None and micro.valid.shape == output.shape[: micro.valid.dim()]:
            output = output[micro.valid]
        seen.append(output.flatten(0, -2) if output.dim() > 1 else output[None])
    found = float(torch.cat(seen).var(0, correction=0).mean())
    if not found > 0:
        raise TrainingError(
            "the teacher's output is the same for all samples",
            hint="give samples that differ, or a loss of your own",
        )
    return found


def _with_tokens(micro: Micro, tokens: Tensor) -> Micro:
    """The same call with other tokens."""

    def other(value: Any) -> Any:
        return tokens if value is micro.tokens else value

    args = tuple(other(v) for v in micro.args)
    kwargs = {k: other(v) for k, v in micro.kwargs.items()}
    return Micro(micro.given, args, kwargs, tokens, micro.valid, micro.labels, micro.count)
