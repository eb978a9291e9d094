"""What is left alone unless it is asked for by name: routers, outputs, depthwise kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from graphprune.analysis.program import BaseProgram
from graphprune.streaming.core.layout import Convolution
from graphprune.streaming.core.sites import Site

_EXPERTS = ("experts", "expert_groups")


def unwanted(
    program: BaseProgram,
    found: Mapping[str, Sequence[Site]],
    is_output: Callable[[Site], bool],
    is_chosen_from: Callable[[Site], bool] = lambda site: False,
) -> dict[str, str]:
    """Parameters that are not treated by default, to the reason.

    Args:
        program: the program.
        found: parameter to its sites.
        is_output: whether a product reaches the model's outputs without meeting another tensor.
        is_chosen_from: whether the largest of a product are looked for.
    """
    routers = _routers(program)
    reasons: dict[str, str] = {}
    for name, sites in found.items():
        layout = sites[0].layout
        shape = program.parameters[name]
        out = shape[1] if getattr(layout, "transposed", False) and len(shape) == 2 else shape[0]
        if name in routers or any(map(is_chosen_from, sites)):
            reasons[name] = "a router"
        elif any(map(is_output, sites)):
            reasons[name] = "its result is an output of the model"
        elif isinstance(layout, Convolution) and shape[1] == 1 and layout.groups > 1:
            reasons[name] = "a depthwise convolution"
        elif len(shape) == 2 and out == 1:
            reasons[name] = "it has a single output"
    return reasons


def _routers(program: BaseProgram) -> set[str]:
    """Matrices whose results are as many as there are experts in some stack of them."""
    return {
        name
        for s in program.structures
        if s.role in _EXPERTS
        for name, _ in s.members
        if len(program.parameters[name]) == 2
    }
