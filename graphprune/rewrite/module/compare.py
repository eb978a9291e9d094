"""Running two forms of one model on the same inputs, and comparing what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.frontends.hf.load import plain_experts
from graphprune.ir.torch.randomness import seeded
from graphprune.rewrite.module.exactly import Exactly
from graphprune.rewrite.module.reload import SEED, run_plainly, run_widened

Example = tuple[tuple[Any, ...], dict[str, Any]]
Outputs = Mapping[str, torch.Tensor]

TOLERANCE = 2e-5
"""Largest difference that passes, relative to the largest output; more for short floats."""

EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The same where all numbers are computed in this dtype."""

SCALES = (0.01, 1.0, 100.0)
"""Of random inputs. What a factor does to a softmax, or an epsilon to a norm, shows at some."""

_MUCH = 1e-3
"""The most that passes as rounding of float32, relative to the largest output."""


def probe(example: Example, seed: int = 0) -> Example:
    """Return inputs like the example ones: floats drawn anew, since examples are often constant.

    Integers (token ids, masks) keep their values, whose range only the model knows. Those without
    values, on the meta device, become ones and twos, valid as token ids and as masks.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        device = "cpu" if value.is_meta else value.device
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(device, value.dtype)
        if value.is_complex():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.complex64)
            return drawn.to(device, value.dtype)
        if value.is_meta:
            return torch.randint(1, 3, value.shape, generator=generator).to(value.dtype)
        return value

    return pytree.tree_map(draw, example)  # type: ignore[no-any-return]


def probes(example: Example) -> list[Example]:
    """Return the inputs that forms of a model are compared on.

    Random ones of unit scale come first, then those of other scales, then the caller's example
    where it has values. Integers are the example's in all of them.
    """
    leaves = [x for x in pytree.tree_leaves(example) if isinstance(x, torch.Tensor)]
    drawn = probe(example)
    found = [drawn]
    if any(x.is_floating_point() or x.is_complex() for x in leaves):
        found += [_scaled(drawn, scale) for scale in SCALES if scale != 1]
        found += [] if any(x.is_meta for x in leaves) else [example]
    return found


def _scaled(inputs: Example, scale: float) -> Example:
    def multiply(value: Any) -> Any:
        inexact = isinstance(value, torch.Tensor) and (
            value.is_floating_point() or value.is_complex()
        )
        return value * scale if inexact else value

    return pytree.tree_map(multiply, inputs)  # type: ignore[no-any-return]


def run(model: Callable[..., Any], inputs: Example) -> dict[str, torch.Tensor]:
    """Run a model and return its floating-point outputs by name; random numbers are the same."""
    with seeded(SEED):
        return run_plainly(model, inputs)


def run_exactly(
    module: nn.Module, inputs: Example, dtype: torch.dtype, *, whole: bool = True
) -> dict[str, torch.Tensor]:
    """Run a model with everything in float64, or in float32 where that is all that fits.

    Args:
        module: the model.
        inputs: of it.
        dtype: float64 or float32.
        whole: whether a copy of the model is made in float64. Without one, each weight is widened
            where it is used, and no memory is needed for the others.

    Returns:
        All of its outputs, integers too.

    Raises:
        RuntimeError: Its code doesn't go with that dtype. Models raise other exceptions too.
    """
    # Recurrent layers compare the dtype of their weights with that of their input.
    wide = module
    if dtype == torch.float64 and whole:
        wide = copy.deepcopy(module).double()
        plain_experts(wide)
    with seeded(SEED):
        return run_widened(wide, inputs, Exactly(dtype))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def rounding(module: nn.Module) -> float:
    """Return the difference that passes for a module: its least exact weights set it.

    Outputs in float32 say nothing of steps in between that were computed in bfloat16.
    """
    tensors = [*module.parameters(), *module.buffers()]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    return max([TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in dtypes)])


def rounded_off(found: Outputs, exact: Outputs) -> float:
    """Return the difference that passes for a module because its graph isn't more exact.

    A module that computes the same in another order rounds as much as the graph. With large
    weights, such as a refit may find, that is more than what passes otherwise.

    Args:
        found: What the graph computes.
        exact: The same in float64.

    Returns:
        Relative to the largest output.
    """
    lost = [error / scale for error, scale in (_apart(found[n], exact[n]) for n in found)]
    return min(2 * max(lost, default=0.0), _MUCH)


def deviation(found: Outputs, expected: Outputs, tolerance: float | None = None) -> str | None:
    """Say how outputs differ from those expected.

    Args:
        found: Outputs by name.
        expected: Those that have to be there. Integers have to be equal.
        tolerance: The largest difference that passes, relative to the largest output; None for
            what the dtype of the output allows.

    Returns:
        None if all the expected ones are there and equal within the tolerance.
    """
    if not expected:
        return "there are no outputs to compare"
    for name, want in expected.items():
        got = found.get(name)
        if got is None or got.shape != want.shape:
            shape = None if got is None else tuple(got.shape)
            return f"output '{name}' has shape {shape} instead of {tuple(want.shape)}"
        if not want.is_floating_point():
            if not torch.equal(want.cpu(), got.cpu()):
                return f"output '{name}' has other values"
            continue
        if not torch.equal(want.isfinite().cpu(), got.isfinite().cpu()):
            return f"output '{name}' is infinite or NaN in other places"
        error, scale = _apart(got, want)
        allowed = tolerance or max(TOLERANCE, 8 * torch.finfo(want.dtype).eps)
        if error > allowed * scale:
            return f"output '{name}' differs by {error:.3g} where the largest value is {scale:.3g}"
    return None


def _apart(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The largest difference where both are finite, and the largest value expected there."""
    wide, narrow = expected.detach().double().cpu(), found.detach().double().cpu()
    finite = wide.isfinite() & narrow.isfinite()
    if not finite.any():
        return 0.0, 1.0
    return (
        float((wide - narrow)[finite].abs().max()),
        max(float(wide[finite].abs().max()), 1e-6),
    )
