"""What the kernels compute, in plain torch: for tests, and where no kernel runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .packed import Packed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}


def check_activation(activation: str) -> str:
    """The name of an activation that the kernels know.

    Raises:
        ValueError: They don't.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} isn't one of {', '.join(ACTIVATIONS)}")
    return activation


def linear(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    activation: str = "none",
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """activation(x W^T + bias), by way of the dense matrix.

    Args:
        x: [..., columns], floating-point.
        packed: the weight W, [rows, columns].
        bias: [rows].
        activation: a name in `ACTIVATIONS`.
        accumulate: what is calculated in, float32 or float64.

    Returns:
        [..., rows], of the type of x; of `accumulate` where that is float64, so that tests see
        the result before it is rounded.

    Raises:
        ValueError: The activation is unknown, or shapes don't fit.
    """
    check_activation(activation)
    rows, columns = packed.shape
    if x.shape[-1] != columns:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {columns}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has the shape {list(bias.shape)} instead of [{rows}]")
    weight = packed.unpack().to(accumulate)
    y = functional.linear(x.to(accumulate), weight, None if bias is None else bias.to(accumulate))
    y = ACTIVATIONS[activation](y)
    return y if accumulate == torch.float64 else y.to(x.dtype)
