"""What training minimises: a sum over tokens, and how many tokens it is a sum of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.training.core.losses import (
    OUT,
    cross_entropy,
    divergence,
    product_dtype,
    relative_error,
    square_head,
    summed,
)
from graphprune.training.core.options import Training
from graphprune.training.core.samples import Micro
from graphprune.training.model.calls import (
    call,
    first_output,
    logits_in_parts,
    outputs,
    tapped,
)
from graphprune.training.model.student import Student

OwnLoss = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor | float]]
"""Of the model and what the data has of some samples: their mean loss, or a sum and its count."""

_CHUNK = 1 << 23
"""Logits that are in memory at a time."""


@dataclass
class Setting:
    """What the loss of a run depends on beside the student.

    Attributes:
        training: options.
        teacher: the model that the student is to be like; None for losses without one.
        own: a loss of the user's, in place of the named one.
        vocabulary: numbers of the teacher's classes that the student has kept; None for all.
        layers: path of each layer of the student to that of the teacher's it is compared with.
        causal: whether the label of a token is the next one.
        variance: of an element of the teacher's output, for "values".
    """

    training: Training
    teacher: Student | None = None
    own: OwnLoss | None = None
    vocabulary: Tensor | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    causal: bool = False
    variance: float = 1.0


class Objective(nn.Module):
    """A student with its loss: called with samples, it gives a sum and the number of terms."""

    def __init__(self, student: Student, setting: Setting) -> None:
        super().__init__()
        self.model = student.module
        self._student, self._setting = student, setting

    def of(self, student: Student) -> Objective:
        """The same loss of another model."""
        return Objective(student, self._setting)

    @torch.no_grad()
    def outputs(self, micro: Micro) -> Tensor | None:
        """The model's first output as it trains, or the value of a loss of the user's.

        None where the output is no tensor.
        """
        found: Tensor | None = self(micro, compared=False)
        return found

    def forward(self, micro: Micro, *, compared: bool = True) -> Any:
        """The sum of the losses of some samples, and the number of tokens that they are of.

        What wraps this module to share its weights among processes knows of this call only, so that
        it gives the model's outputs too, if they are not to be `compared` with anything.

        Raises:
            TrainingError: the loss needs what the model or the data doesn't have.
        """
        setting = self._setting
        if setting.own is not None:
            found = _own(setting.own, self.model, micro)
            return found if compared else found[0].clone()
        if not compared:
            return outputs(self._student, micro)
        kind = setting.training.loss
        if kind == "hidden":
            return self._hidden(micro)
        if kind == "values":
            return self._values(micro)
        return self._logits(micro, kind or "ce")

    def _logits(self, micro: Micro, kind: str) -> tuple[Tensor, Tensor]:
        """Losses of the distribution that the model's logits are."""
        setting = self._setting
        rows, weight, bias = logits_in_parts(self._student, micro)
        labels = self._labels(micro, rows.shape[:-1])
        counted = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
        if labels is not None:
            counted = labels != OUT
        elif micro.valid is not None and micro.valid.shape == counted.shape:
            counted = micro.valid
        flat = rows[counted]
        if labels is not None:
            labels = labels[counted]
        teacher = None
        if kind != "ce":
            assert setting.teacher is not None
            with torch.no_grad():
                theirs, head, shift = logits_in_parts(setting.teacher, micro)
                if head is not None:
                    head = head.to(product_dtype(head))  # once for all parts
                teacher = theirs[counted]
        kept, temperature = setting.vocabulary, setting.training.temperature

        def part(logits: Tensor, place: slice) -> Tensor:
            total = logits.new_zeros((), dtype=torch.float32)
            if kind != "kd":
                assert labels is not None
                total = total + cross_entropy(logits, labels[place])
            if teacher is not None:
                with torch.no_grad():
                    right = teacher[place]
                    if head is not None:
                        right = nn.functional.linear(right, head, shift)
                    right = right if kept is None else right[..., kept.to(right.device)]
                _check_same(logits, right)
                total = total + divergence(logits, right, temperature)
            return total / 2 if kind == "kd+ce" else total

        classes = flat.shape[-1] if weight is None else len(weight)
        loss = summed(flat, weight, bias, part, max(1, _CHUNK // classes))
        return loss, torch.tensor(len(flat), dtype=torch.float64)

    def _labels(self, micro: Micro, shape: torch.Size) -> Tensor | None:
        """What each row of logits should say; None where only the teacher is asked."""
        causal = self._setting.causal and micro.tokens is not None and micro.tokens.shape == shape
        labels = micro.labels
        if labels is not None and labels.shape != shape:
            raise TrainingError(
                "the labels don't fit the logits",
                why=f"{tuple(labels.shape)}, where {tuple(shape)} is needed",
            )
        if labels is None and self._setting.training.loss == "kd":
            return None
        if labels is None and causal:
            assert micro.tokens is not None
            labels = micro.tokens.long()
            if micro.valid is not None:
                labels = labels.masked_fill(~micro.valid, OUT)
        if labels is None:
            raise TrainingError(
                "the loss needs labels",
                why="the model doesn't predict the next token of a text",
                hint="give the data as a mapping with 'labels', a loss of your own, or a teacher "
                "and loss: kd",
            )
        return _next(labels) if causal else labels

    def _values(self, micro: Micro) -> tuple[Tensor, Tensor]:
        """The distance of outputs that are no logits."""
        teacher = self._setting.teacher
        assert teacher is not None
        ours = first_output(call(self._student, micro))
        with torch.no_grad():
            theirs = first_output(call(teacher, micro))
        _check_same(ours, theirs)
        if micro.valid is not None and micro.valid.shape == ours.shape[: micro.valid.dim()]:
            ours, theirs = ours[micro.valid], theirs[micro.valid]
        loss = relative_error(ours, theirs, self._setting.variance)
        return loss, torch.tensor(len(ours), dtype=torch.float64)

    def _hidden(self, micro: Micro) -> tuple[Tensor, Tensor]:
        """The distance between layers, each token's by its own size."""
        setting = self._setting
        assert setting.teacher is not None
        with tapped(self._student, setting.layers.keys()) as ours:
            call(self._student, micro)
        with torch.no_grad(), tapped(setting.teacher, setting.layers.values()) as theirs:
            call(setting.teacher, micro)
        total, count = torch.zeros((), device=next(iter(ours.values())).device), 0
        for own, other in setting.layers.items():
            a, b = ours[own], theirs[other]
            _check_same(a, b)
            if micro.valid is not None and micro.valid.shape == a.shape[:-1]:
                a, b = a[micro.valid], b[micro.valid]
            a, b = a.flatten(0, -2), b.flatten(0, -2)
            total, count = total + square_head(a, b), len(a)
        return total, torch.tensor(count, dtype=torch.float64)


def _own(own: OwnLoss, model: nn.Module, micro: Micro) -> tuple[Tensor, Tensor]:
    """A loss of the user's."""
    value: Any = own(model, micro.given)
    if isinstance(value, tuple):
        total, count = value
        return total, torch.as_tensor(count, dtype=torch.float64)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TrainingError("the loss is not a scalar", hint="return the mean over the samples")
    return value.reshape(()) * micro.count, torch.tensor(micro.count, dtype=torch.float64)


def _next(tokens: Tensor) -> Tensor:
    """The label of each token: the one after it."""
    return torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), OUT)], 1).long()


def _check_same(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise TrainingError(
            "the model's output and its teacher's have other shapes",
            why=f"{tuple(ours.shape)} and {tuple(theirs.shape)}",
            hint="name what was kept: vocabulary= for classes, layers= for layers",
        )
