"""The processes that train together: one, or as many as torchrun has started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.ranks.group import current

_BUCKET = 1 << 24
"""Elements of gradients that are summed in one message."""


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        device: where its share of the samples is computed.
        rank: its number.
        world: how many there are.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    def total(self, *numbers: float) -> list[float]:
        """The sums of numbers over all processes."""
        if self.world == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self._spoken())
        dist.all_reduce(sums)
        return [float(x) for x in sums.tolist()]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """The sums of gradients over all processes, some of which may have none of a parameter."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.numel() for g in bucket) >= _BUCKET:
                _sum_together(bucket)
                bucket = []
        _sum_together(bucket)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def _spoken(self) -> torch.device:
        """Where tensors of messages lie: gloo speaks of memory, nccl of a GPU's."""
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")


def processes() -> Processes:
    """This process, its device and the others.

    Raises:
        TrainingError: accelerate isn't installed.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise TrainingError(
            "training needs accelerate",
            why=str(error),
            hint="pip install 'graphprune[train]'",
        ) from error
    # It looks for a GPU's backend unless it is told that there is none.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if current().apart:  # what one does for all of a shared run
        return Processes(state.device)
    return Processes(state.device, state.process_index, state.num_processes)


def shard(module: nn.Module, blocks: Iterable[str], everyone: Processes) -> None:
    """Share a module's weights among the processes, layer by layer.

    Args:
        module: what is called; its layers are gathered one at a time.
        blocks: paths of the layers.
        everyone: the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(everyone.device.type, (everyone.world,))
    for path in blocks:
        fully_shard(module.get_submodule(path), mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_shared(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor only."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """A whole tensor, of which each process may hold a share."""
    gathered: Any = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gathered is None else gathered()
    return whole.detach()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    own: Any = getattr(tensor, "to_local", None)
    part: Tensor = tensor if own is None else own()
    return part


def assign(tensor: Tensor, whole: Tensor) -> None:
    """Give a tensor, of which each process may hold a part, new values."""
    local(tensor).copy_(cut(whole, tensor))


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, as it has of another one."""
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements).to_local()


def _sum_together(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(
        gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
