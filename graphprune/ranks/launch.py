"""How processes find one another: torchrun, or whatever sets the same variables, starts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from graphprune.ranks.environment import own_place, started
from graphprune.ranks.group import Ranks, RanksError, _current, current

_PATIENCE = timedelta(days=2)
"""One process may solve a weight, or write a model, for hours while the others wait. One that is
gone is noticed at once: its connections close, and torchrun ends the others."""


@contextmanager
def together() -> Iterator[Ranks]:
    """Share what is run in the block with the other processes that run it as well.

    Where `torch.distributed` has been initialised already, its processes take part; otherwise those
    that torchrun has started: over gloo on CPUs, over nccl where tensors lie on GPUs. Alone, a
    process shares nothing.

    Raises:
        RanksError: the processes don't find one another, or this torch can't have several.
    """
    if not dist.is_available() or (not dist.is_initialized() and started() == 1):
        yield current()
        return
    begun = not dist.is_initialized()
    found = _begin() if begun else _joined()
    before = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(before)
        if begun and dist.is_initialized():
            dist.destroy_process_group()


def _begin() -> Ranks:
    """Form a group of the processes that torchrun has started."""
    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if gpu:
        torch.cuda.set_device(own_place() % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            "the processes of this run don't find one another",
            why=" ".join(str(error).split())[:200],
            hint="start them with torchrun --nproc-per-node N -m graphprune compile ...",
        ) from error
    direct = frozenset({"cpu", "cuda"} if gpu else {"cpu"})
    return Ranks(dist.get_rank(), dist.get_world_size(), None, direct)


def _joined() -> Ranks:
    """A group of our own among processes that have found one another already."""
    if current().world > 1:
        return current()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), group)
