"""LoRAPrune's criterion: what the loss changes by when an element becomes zero."""

from __future__ import annotations

from torch import Tensor


def estimated(a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
    """The gradient of a weight ``W + cBA``, as those of its adapter show it.

    It is how BA changes, but for the sign, in a step of size 1 along the gradients of A and B:
    ``BA - (B - dB)(A - dA) = dB A + B dA - dB dA``.

    Args:
        a: ``[parts, rank, in]``.
        b: ``[parts, out, rank]``.
        da: gradient of the mean loss with respect to `a`.
        db: the same of `b`.

    Returns:
        ``[parts, out, in]``.
    """
    return db @ (a - da) + b @ da


def importance(gradient: Tensor, weight: Tensor) -> Tensor:
    """How much each element matters: ``|G * W|``, to first order what the loss changes by.

    Args:
        gradient: of the weight, or what stands for it.
        weight: the effective one, with what its adapter adds.
    """
    return (gradient * weight).abs()
