"""Zeros that stay zeros while the other weights train.

A mask is data: which weights stay. A weight that stays and happens to be 0 is no part of it, and
neither hooks on gradients nor products with a mask hold it: a gradient of before, a moment of the
optimiser, or a wrapper that exchanges the parameters would bring pruned weights back. Zeros are
filled in after each step, into whatever the parameter is by then: a shard of it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from graphprune.errors import TrainingError
from graphprune.training.core.processes import cut, local
from graphprune.training.core.zeros import fill_zeros


@dataclass
class HeldMasks:
    """Masks of the parameters of a module.

    Attributes:
        module: the module; what wraps it later may replace its parameters.
        kept: parameter name, as the module has it, to bool of its shape: False where a zero is.
    """

    module: nn.Module
    kept: Mapping[str, Tensor]

    @torch.no_grad()
    def fill(self) -> None:
        """Zeros into the weights: +0.0, which a product with a mask would not always be."""
        for name, parameter in self._parameters():
            self._fill(name, parameter, parameter)

    @torch.no_grad()
    def fill_gradients(self) -> None:
        """Zeros into the gradients, so that they count in no norm and in no moment."""
        for name, parameter in self._parameters():
            # Those of a few rows of an embedding count only in the moments of these rows.
            if parameter.grad is not None and not parameter.grad.is_sparse:
                self._fill(name, parameter, parameter.grad)

    @torch.no_grad()
    def fill_state(self, optimizer: Optimizer) -> None:
        """Zeros into what an optimiser remembers of the weights, as a new mask needs."""
        for name, parameter in self._parameters():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    self._fill(name, parameter, value)

    @torch.no_grad()
    def zeros(self) -> dict[str, int]:
        """Zeros of every weight on this process, those of a mask and others."""
        return {
            name: part.numel() - int(part.count_nonzero())
            for name, part in ((n, local(p)) for n, p in self._parameters())
        }

    @torch.no_grad()
    def check(self) -> None:
        """Make sure that every zero of every mask is one.

        Raises:
            TrainingError: one isn't.
        """
        for name, parameter in self._parameters():
            left = int(local(parameter)[~self._kept(name, parameter)].count_nonzero())
            if left:
                raise TrainingError(
                    f"{left:,} weights that were pruned are not 0",
                    where=name,
                    why="something changed them after the last step of the optimiser",
                    hint="call fill() after what changes weights outside of the optimiser",
                )

    def _fill(self, name: str, parameter: Tensor, value: Tensor) -> None:
        fill_zeros(local(value), self._kept(name, parameter))

    def _kept(self, name: str, parameter: Tensor) -> Tensor:
        """The mask of this process's part of a parameter, where the parameter is."""
        key = name, str(parameter.device), str(getattr(parameter, "placements", ""))
        if key not in self._parts:
            mask = self.kept[name]
            if mask.shape != parameter.shape:
                raise TrainingError(
                    "a parameter no longer has the shape of its mask",
                    where=name,
                    why=f"{tuple(parameter.shape)}, and the mask has {tuple(mask.shape)}",
                    hint="FSDP1 flattens parameters: shard with FSDP2 (fully_shard)",
                )
            self._parts[key] = cut(mask.to(parameter.device), parameter)
        return self._parts[key]

    def __post_init__(self) -> None:
        """No mask is cut yet."""
        self._parts: dict[tuple[str, ...], Tensor] = {}

    def _parameters(self) -> list[tuple[str, Tensor]]:
        """The parameters as they are now."""
        return [(name, self.module.get_parameter(name)) for name in self.kept]


@dataclass
class Handle(HeldMasks):
    """What keeps zeros in a module while any optimiser trains it; see `hold`.

    Attributes:
        optimizer: whose steps are followed; None for those of every optimiser.
    """

    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        """Zeros into the weights as they are, and from now on after each step."""
        super().__post_init__()
        self._hooks: list[Any] = []
        self._cleared: WeakSet[Optimizer] = WeakSet()
        self._settle()
        if self.optimizer is None:
            before = register_optimizer_step_pre_hook(lambda one, *_: self._before(one))
            after = register_optimizer_step_post_hook(lambda *_: self.fill())
        else:
            before = self.optimizer.register_step_pre_hook(lambda one, *_: self._before(one))
            after = self.optimizer.register_step_post_hook(lambda *_: self.fill())
        self._hooks += [before, after]

    def change(self, masks: Mapping[str, Tensor]) -> None:
        """Hold other masks from now on, in the middle of training.

        What they remove becomes 0 at once, with its gradients, those left over from micro-batches
        too, and with what the optimiser remembers of it.

        Args:
            masks: see `hold`; they take the place of all earlier ones.

        Raises:
            TrainingError: see `hold`.
        """
        self.kept = _copied(self.module, masks)
        self._parts.clear()
        self._cleared.clear()
        self._settle()

    def remove(self) -> None:
        """Let the weights go."""
        while self._hooks:
            self._hooks.pop().remove()

    def _settle(self) -> None:
        self.fill()
        if self.optimizer is None:
            self.fill_gradients()
        else:
            self._before(self.optimizer)

    def _before(self, optimizer: Optimizer) -> None:
        """What comes before a step of an optimiser, which may not have met these masks yet."""
        self.fill_gradients()
        if optimizer not in self._cleared:
            self.fill_state(optimizer)
            self._cleared.add(optimizer)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hold(
    module: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None
) -> Handle:
    """Keep the zeros of pruned weights while a training loop of one's own changes the others.

    Works with every optimiser of torch, gradient accumulation, DDP and FSDP2, whether they wrap the
    module before or after. Gradients and moments of pruned weights are 0 too, so that masks may
    `change` in the middle of training.

    Args:
        module: the model.
        masks: parameter name to bool of its shape, True where a weight stays.
        optimizer: the optimiser of the module's weights, or what wraps it (accelerate's and
            Lightning's do); None for whichever takes a step.

    Returns:
        A handle: ``check()`` makes sure that every zero is one, ``zeros()`` counts, ``remove()``
        ends it. It does so too as a context manager.

    Raises:
        TrainingError: a mask belongs to no parameter, or has another shape; or the optimiser is
            none of torch.
    """
    plain = None if optimizer is None else _unwrapped(optimizer)
    return Handle(module, _copied(module, masks), plain)


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimiser that takes the steps, which wrappers keep under this name."""
    found = optimizer
    while isinstance(inner := getattr(found, "optimizer", None), Optimizer):
        found = inner
    if not isinstance(found, Optimizer):
        raise TrainingError(
            "zeros can't be held under this optimiser",
            where=type(optimizer).__name__,
            why="it is no torch.optim.Optimizer, so that nothing says when it takes a step",
            hint="leave the optimizer out, and call fill() after each of its steps",
        )
    return found


def _copied(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that fit a module, which a caller may change afterwards."""
    check_masks(module, masks)
    return {name: mask.clone() for name, mask in masks.items()}


def check_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """See that masks fit the parameters of a module.

    Raises:
        TrainingError: see `hold`.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise TrainingError("a mask belongs to no parameter", where=name)
        shape = parameters[name].shape
        if mask.dtype != torch.bool or mask.shape != shape:
            raise TrainingError(
                "a mask doesn't fit its parameter",
                where=name,
                why=f"{mask.dtype} {tuple(mask.shape)}, where torch.bool {tuple(shape)} is needed",
            )
