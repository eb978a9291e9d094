"""Weights that are held at zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program


def masks_of(program: Program, parameters: Iterable[str]) -> dict[str, Tensor]:
    """Masks that hold what is zero in some parameters, to be given to `match`.

    Args:
        program: a program with weights, such as that of `graphprune.sparsify`.
        parameters: names, such as those of the result's layers.
    """
    return {name: program.weights[name].detach() != 0 for name in parameters}


def check_masks(program: Program, masks: Mapping[str, Tensor]) -> None:
    """See that masks belong to a program, and that what they hold is zero.

    Raises:
        PlanError: they don't, or it isn't.
    """
    for name, mask in masks.items():
        if name not in program.trainable or name in program.aliases:
            raise PlanError(
                f"there is a mask for {name!r}, and the program has no such parameter",
                hint="give canonical names",
            )
        if tuple(mask.shape) != program.parameters[name] or mask.dtype != torch.bool:
            raise PlanError(
                "a mask doesn't fit its parameter",
                where=name,
                why=f"{tuple(mask.shape)} of {mask.dtype} for {program.parameters[name]}",
                hint="give bool tensors of the shapes of the parameters",
            )
        left = int(program.weights[name].detach()[~mask].count_nonzero())
        if left:
            raise PlanError(
                "a mask holds weights at zero that aren't zero",
                where=name,
                why=f"{left} of {int((~mask).sum())} are others",
                hint="give the program that the mask was put on",
            )


def check_zeros(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """See that held weights are zeros whose bits are zero.

    Raises:
        PlanError: some are not, which is a fault of ours.
    """
    for name, mask in masks.items():
        held = weights[name].detach()[~mask]
        wrong = int(held.contiguous().view(torch.uint8).count_nonzero())
        if wrong:
            raise PlanError(
                "weights that a mask holds have not stayed zero",
                where=name,
                why=f"{int(held.count_nonzero())} of {held.numel()}",
                hint="please report this",
            )
