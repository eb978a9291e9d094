"""Calls of models: their logits, what their last layer reads, and the values between layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.training.core.samples import Micro
from graphprune.training.model.student import Student


def call(student: Student, micro: Micro) -> Any:
    """The output of a model."""
    return student.module(*micro.args, **micro.kwargs)


def first_output(output: Any) -> Tensor:
    """Logits, or else the first tensor of an output.

    Raises:
        TrainingError: there is none.
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = next((v for v in output.values() if isinstance(v, Tensor)), None)
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise TrainingError(
            "the model's first output is no tensor",
            why=f"it is a {type(found).__name__}",
            hint="give a loss of your own, a function of (model, batch)",
        )
    return found


@torch.no_grad()
def outputs(student: Student, micro: Micro) -> Tensor | None:
    """The first output of a model, for comparisons; None of a model whose output is no tensor."""
    try:
        return first_output(call(student, micro)).clone()
    except TrainingError:
        return None


def logits_in_parts(student: Student, micro: Micro) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A model's logits, or what its last layer reads, with the weight and bias of that."""
    if student.head is None:
        return first_output(call(student, micro)), None, None
    with without_head(student):
        rows = first_output(call(student, micro))
    head = student.head
    bias = None if head.bias is None else student.weight(head.bias)
    return rows, student.weight(head.weight), bias


@contextmanager
def without_head(student: Student) -> Iterator[None]:
    """Let a model return what its last layer reads."""
    assert student.head is not None
    layer = student.module.get_submodule(student.head.path)
    before = layer.__dict__.get("forward")
    layer.__dict__["forward"] = lambda x, *_: x
    try:
        yield
    finally:
        if before is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = before


@contextmanager
def tapped(student: Student, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The values that layers give in the calls within, by the paths of the layers."""
    found: dict[str, Tensor] = {}
    hooks = []
    for path in paths:

        def keep(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        place = student.taps.get(path, path)
        hooks.append(student.module.get_submodule(place).register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
