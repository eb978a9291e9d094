"""Taylor: what the loss would change by, to first order, if a weight were zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call

from graphprune.errors import PlanError
from graphprune.passes.score import Inputs, Loss, member_sums
from graphprune.passes.units import FloatArray
from graphprune.program import BaseProgram, Program, Structure
from graphprune.streaming.data import with_tokens


@dataclass(frozen=True)
class Taylor:
    """Sum of ``|w * g|`` over what a unit owns, g the gradient of the mean calibration loss.

    Molchanov et al., Importance Estimation for Neural Network Pruning, 2019 (arXiv:1906.10771);
    the absolute value is taken per element, as LLM-Pruner's Element¹ does (Ma et al., 2023,
    arXiv:2305.11627).

    Attributes:
        batch: calibration windows per forward and backward pass, where calibration is a tensor.
    """

    batch: int = 4

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise PlanError("a batch has at least one window", where="score taylor")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.score.Score`.

        Raises:
            PlanError: the model is no PyTorch graph, there is no calibration data, or the loss or
                a gradient is not finite.
        """
        if not isinstance(program, Program):
            raise PlanError(
                "score taylor needs gradients, which a graph of another format doesn't give",
                hint="use score magnitude, or prune the PyTorch model and export it",
            )
        if inputs.calibration is None:
            raise PlanError(
                "score taylor needs calibration data",
                hint="pass calibration=: token windows [windows, length], or batches with a loss=",
            )
        members = (p for s in structures for p, _ in s.members)
        names = {program.aliases.get(p, p) for p in members} & program.trainable
        batches = list(_batches(inputs.calibration, self.batch))
        gradients = mean_gradients(program, names, batches, inputs.loss)

        def tensors(name: str) -> tuple[torch.Tensor, ...]:
            weight = program.weights[name]
            # A parameter that the loss does not depend on can go for free.
            return weight, gradients.get(name, torch.zeros((), device=weight.device)).expand_as(
                weight
            )

        return member_sums(program, structures, tensors, lambda w, g: (w * g).abs())


def mean_gradients(
    program: Program,
    names: set[str],
    batches: Sequence[tuple[Any, int]],
    loss: Loss | None = None,
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all samples, one batch in memory at a time.

    Neither the program nor its module is changed: the graph runs on the program's own tensors.

    Args:
        program: the program.
        names: parameters whose gradients are wanted; the others need no memory.
        batches: (batch, number of samples in it).
        loss: see `Inputs.loss`.

    Returns:
        Parameter name to gradient, accumulated in at least float32; no entry for a parameter that
        the loss does not depend on.

    Raises:
        PlanError: there are no batches or no weights, or the loss is not a finite scalar.
    """
    if not batches:
        raise PlanError("there is no calibration data", hint="give at least one batch")
    module, state = _callable_state(program, names)
    wanted = {name: state[name] for name in names}
    samples = sum(count for _, count in batches)
    total: dict[str, torch.Tensor] = {}

    def model(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, state, args, kwargs)

    for batch, count in batches:
        with torch.enable_grad():
            value = loss(model, batch) if loss else next_token_loss(program, model, batch)
            _check_loss(value)
            gradients = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is None:
                continue
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            wide = wide.mul_(count / samples)
            total[name] = total[name].add_(wide) if name in total else wide
    return total


def next_token_loss(program: Program, model: Callable[..., Any], tokens: Any) -> torch.Tensor:
    """Mean cross-entropy of every token given those before it, in float32.

    Args:
        program: gives the names of the model's inputs.
        model: a causal language model.
        tokens: int64 ``[windows, length]``, length at least 2.

    Raises:
        PlanError: these are no token windows, or the model does not answer with logits.
    """
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise PlanError(
            "calibration data is not a batch of token windows",
            hint="pass integers [windows, length], or a loss= that understands the batches",
        )
    args, kwargs = with_tokens(program.example, tokens)
    output = model(*args, **kwargs)
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list):
        logits = logits[0]
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != tokens.shape:
        raise PlanError(
            "the default loss needs a causal language model",
            why="the first output is not logits [windows, length, vocabulary]",
            hint="pass loss=, a function of (model, batch) that gives a scalar",
        )
    scores = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(scores, tokens[:, 1:].flatten().to(scores.device))


def _batches(calibration: Any, size: int) -> Iterator[tuple[Any, int]]:
    if isinstance(calibration, torch.Tensor):
        for start in range(0, len(calibration), size):
            part = calibration[start : start + size]
            yield part, len(part)
    else:
        for batch in calibration:
            yield batch, len(batch) if isinstance(batch, torch.Tensor) else 1


def _callable_state(
    program: Program, wanted: set[str]
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model, and the program's tensors under the names that it knows them by."""
    module = program.module if program.module is not None else program.exported.module()
    own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    state = {}
    for name in own:
        canonical = program.aliases.get(name, name)
        if canonical in program.weights:
            tensor = program.weights[canonical].detach()
            state[name] = tensor.requires_grad_(canonical in wanted)
    values = [t for t in state.values() if t.is_meta]
    if values or not wanted <= state.keys():
        raise PlanError(
            "gradients need weights",
            why="the program was traced without them",
            hint="load the checkpoint with its weights, or take score random",
        )
    return module, state


def _check_loss(value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise PlanError("the calibration loss is not a scalar", hint="take its mean or its sum")
    if not bool(value.detach().isfinite()):
        raise PlanError(
            "the calibration loss is not a finite number",
            why=f"it is {value.item()}",
            hint="check the calibration data and the checkpoint for NaN",
        )
