"""Gradients of a calibration loss, each handed on as soon as it is there and then let go.

The gradients of all parameters together are as large as the model. A score that can use them one
by one, as the backward pass makes them, never holds more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.func import functional_call

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.batches import with_tokens
from graphprune.errors import PlanError
from graphprune.exclusive import alone, one_at_a_time
from graphprune.ir.torch.program import Program, is_traced
from graphprune.passes.shared.reduce import Salience
from graphprune.passes.shared.score import Inputs, Loss, Sums, checked_marginals
from graphprune.placement import Placement, present
from graphprune.placement.graphs import moved_graphs
from graphprune.plan.units import FloatArray

Batch: TypeAlias = tuple[Any, int]
"""What a loss understands, and the number of samples in it."""

Take: TypeAlias = Callable[[str, torch.Tensor, float], None]
"""Called with a parameter's name, its gradient for one batch, and the batch's share of samples."""


def differentiable(program: BaseProgram, inputs: Inputs, score: str) -> Program:
    """`program`, if a score can take gradients of it.

    Raises:
        PlanError: it is no PyTorch graph, or there is no calibration data.
    """
    if not is_traced(program):
        raise PlanError(
            f"score {score} needs gradients, which a graph of another format doesn't give",
            hint="use score magnitude, or prune the PyTorch model and export it",
        )
    if inputs.calibration is None:
        raise PlanError(
            f"score {score} needs calibration data",
            hint="pass calibration=: token windows [windows, length], or batches with a loss=",
        )
    return program


def batches_of(calibration: Any, size: int) -> list[Batch]:
    """Calibration data in batches: a tensor in parts of `size` windows, a sequence as it is."""
    return list(_batches(calibration, size))


def samples_of(calibration: Any) -> list[Batch]:
    """Calibration data one sample at a time; a batch that is no tensor counts as one sample."""
    found: list[Batch] = []
    for batch, _ in _batches(calibration, 1):
        if isinstance(batch, torch.Tensor) and batch.dim():
            found += [(batch[i : i + 1], 1) for i in range(len(batch))]
        else:
            found.append((batch, 1))
    return found


def backward(
    program: Program,
    names: Collection[str],
    batches: Sequence[Batch],
    loss: Loss | None,
    take: Take,
) -> None:
    """Run every batch forward and backward, and hand over each gradient when it is complete.

    What `take` doesn't keep is freed before the next gradient is made. Neither the program nor its
    module is changed: the graph runs on the program's own tensors.

    Args:
        program: the program.
        names: canonical names of the parameters whose gradients are wanted; the others need none.
        batches: see `batches_of`.
        loss: see `Inputs.loss`.
        take: given each gradient of the loss of one batch, dense, in the parameter's dtype. Not
            called for a parameter that the loss doesn't depend on.

    Raises:
        PlanError: there are no batches or no weights, or the loss is not a finite scalar that
            depends on the model.
    """
    if not batches:
        raise PlanError("there is no calibration data", hint="give at least one batch")
    place = present()
    module, state, leaves = _callable_state(program, names, place)
    if not leaves:
        return
    samples = sum(count for _, count in batches)
    share = 0.0

    def model(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, state, place.bring(args), place.bring(kwargs))

    def hand_over(name: str, leaf: torch.Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        take(name, gradient.to_dense() if gradient.is_sparse else gradient, share)

    for name, leaf in leaves.items():
        hook = partial(hand_over, name)
        leaf.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    for batch, count in batches:
        share = count / samples
        batch = place.bring(batch)
        with alone():  # a module, which another thread's trace would listen to
            with torch.enable_grad():
                value = loss(model, batch) if loss else next_token_loss(program, model, batch)
            _check_loss(value)
            torch.autograd.backward(value, inputs=list(leaves.values()))


def mean_gradients(
    program: Program, names: Collection[str], batches: Sequence[Batch], loss: Loss | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all samples, one batch in memory at a time.

    Args:
        program: the program.
        names: see `backward`.
        batches: see `batches_of`.
        loss: see `Inputs.loss`.

    Returns:
        Parameter name to gradient, accumulated in at least float32; no entry for a parameter that
        the loss does not depend on.

    Raises:
        PlanError: see `backward`.
    """
    total: dict[str, torch.Tensor] = {}

    def take(name: str, gradient: torch.Tensor, share: float) -> None:
        _accumulate(total, name, widened(gradient), share)

    backward(program, names, batches, loss, take)
    return total


def moments(
    program: Program, names: Collection[str], samples: Sequence[Batch], loss: Loss | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mean gradient, and diagonal of the Fisher information: ``mean of g_n²`` over all samples n.

    Args:
        program: the program.
        names: see `backward`.
        samples: see `samples_of`; the gradient of each is squared on its own.
        loss: see `Inputs.loss`.

    Returns:
        Two mappings of parameter name to tensor, as `mean_gradients`.

    Raises:
        PlanError: see `backward`.
    """
    mean: dict[str, torch.Tensor] = {}
    square: dict[str, torch.Tensor] = {}

    def take(name: str, gradient: torch.Tensor, share: float) -> None:
        wide = widened(gradient)  # squares of small gradients vanish in half precision
        _accumulate(square, name, wide.square(), share)
        _accumulate(mean, name, wide, share)

    backward(program, names, samples, loss, take)
    return mean, square


def summed(
    program: Program,
    dims: Mapping[str, Sequence[int]],
    batches: Sequence[Batch],
    loss: Loss | None,
    salience: Salience,
) -> dict[str, Sums]:
    """Mean over batches of the sums of a salience, without ever holding two gradients.

    Args:
        program: the program.
        dims: parameter to the dimensions wanted; see `graphprune.passes.shared.score.wanted_dims`.
        batches: see `batches_of`.
        loss: see `Inputs.loss`.
        salience: of a weight and its gradient, element by element.

    Returns:
        For every parameter of `dims` its sums; zeros where the loss doesn't depend on it.

    Raises:
        PlanError: see `backward`, or a salience is not finite.
    """
    shapes = program.parameters
    total: dict[str, dict[int, FloatArray]] = {
        name: {d: np.zeros((shapes[name] or (1,))[d]) for d in wanted}
        for name, wanted in dims.items()
    }

    def take(name: str, gradient: torch.Tensor, share: float) -> None:
        pair = (program.weights[name].to(gradient.device), gradient)
        for dim, sums in checked_marginals(name, pair, salience, dims[name]).items():
            total[name][dim] += share * sums

    backward(program, list(dims), batches, loss, take)
    return {name: sums for name, sums in total.items()}


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or as it is if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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


def _accumulate(
    total: dict[str, torch.Tensor], name: str, part: torch.Tensor, share: float
) -> None:
    """Add a part, which nobody else needs, to a sum."""
    if name in total:
        total[name].add_(part, alpha=share)
    else:
        total[name] = part.mul_(share)


def _batches(calibration: Any, size: int) -> Iterator[Batch]:
    if isinstance(calibration, torch.Tensor):
        for start in range(0, len(calibration), size):
            part = calibration[start : start + size]
            yield part, len(part)
    else:
        for batch in calibration:
            yield batch, len(batch) if isinstance(batch, torch.Tensor) else 1


@one_at_a_time
def _callable_state(
    program: Program, wanted: Collection[str], place: Placement
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model, the program's tensors under the names that it knows them by, and its leaves.

    Tied names share one tensor, so that its gradient is that of all its uses.
    """
    module = program.module
    if module is None:
        module = program.exported.module()
        if place.away:
            module = moved_graphs(module, place.device)
    own = dict((*module.named_parameters(), *module.named_buffers()))
    tensors: dict[str, torch.Tensor] = {}
    state = {}
    for name, stored in own.items():
        canonical = program.aliases.get(name, name)
        if canonical in program.weights:
            if canonical not in tensors:
                tensor = place.bring(program.weights[canonical].detach())
                tensors[canonical] = tensor.requires_grad_(canonical in wanted)
            state[name] = tensors[canonical]
        elif place.away:  # a table that no checkpoint has
            state[name] = place.bring(stored.detach())
    if any(t.is_meta for t in tensors.values()) or not set(wanted) <= tensors.keys():
        raise PlanError(
            "gradients need weights",
            why="the program was traced without them",
            hint="load the checkpoint with its weights, or take score random",
        )
    return module, state, {name: tensors[name] for name in wanted}


def _check_loss(value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise PlanError("the calibration loss is not a scalar", hint="take its mean or its sum")
    if not bool(value.detach().isfinite()):
        raise PlanError(
            "the calibration loss is not a finite number",
            why=f"it is {value.item()}",
            hint="check the calibration data and the checkpoint for NaN",
        )
    if not value.requires_grad:
        raise PlanError(
            "the calibration loss doesn't depend on the weights to be scored",
            hint="compute it with the model that it is given, with gradients on",
        )
