"""Devices by the names that torch gives them, and what is there of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from graphprune.errors import RecipeError

CPU = torch.device("cpu")

_WITHOUT_DOUBLES = ("mps",)
"""Kinds of devices that have no float64, in which statistics are summed and systems solved."""


def find_device(name: str | torch.device) -> torch.device:
    """Find a device, with its number where there are several of its kind.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, or any other kind that torch knows. ``auto``
            is the accelerator that torch would take, CUDA first, and the processor where there is
            none. Without a number it is the one that torchrun gives the process (`LOCAL_RANK`), or
            the present one.

    Raises:
        RecipeError: it isn't there, or can't do what is asked of it.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type in _WITHOUT_DOUBLES:
            return CPU
        name = found.type
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(
            f"there is no kind of device called {name!r}",
            where="device",
            hint="write auto, cpu, cuda or cuda:1",
        ) from error
    if device.type == "cpu":
        return CPU
    _check(device)
    return torch.device(device.type, _own(device.type)) if _number_of(device) is None else device


def free_memory(device: torch.device) -> int | None:
    """Bytes of a device that can be taken; None where torch can't tell."""
    if device.type == "cpu":
        return None
    try:
        free, _ = torch.accelerator.get_memory_info(device)
        # Torch keeps what it has been given back.
        kept = torch.accelerator.memory_reserved(device) - used_memory(device)
    except (RuntimeError, ValueError, AttributeError, AssertionError):
        return None
    return int(free + kept)


def used_memory(device: torch.device) -> int:
    """Bytes of a device that tensors of this process take; 0 where torch can't tell."""
    try:
        return int(torch.accelerator.memory_allocated(device))
    except (RuntimeError, ValueError, AttributeError, AssertionError):
        return 0


@contextmanager
def limited(device: torch.device, size: int | None) -> Iterator[None]:
    """Have torch take no more than `size` bytes of a device, where it can be told that."""
    if size is None or device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(size / whole, before), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def let_go(device: torch.device) -> None:
    """Give memory of a device that holds nothing any more back to it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check(device: torch.device) -> None:
    """Refuse a device that isn't there.

    Raises:
        RecipeError: it isn't, or has no float64.
    """
    kind = device.type
    module = _module(kind)
    if module is None or not hasattr(module, "device_count"):
        raise _refusal(device, f"this build of PyTorch can't compute on {kind}")
    if kind in _WITHOUT_DOUBLES:
        raise _refusal(device, f"{kind} has no float64, which statistics and solvers need")
    count = module.device_count() if module.is_available() else 0
    if not count:
        raise _refusal(device, f"PyTorch {torch.__version__} finds no {kind} device")
    number = _number_of(device)
    if number is not None and number >= count:
        raise _refusal(device, f"there {_counted(count)}, counted from 0")


def _module(kind: str) -> Any:
    try:
        return torch.get_device_module(kind)
    except (RuntimeError, ValueError):
        return None


def _own(kind: str) -> int:
    """The number of this process's device."""
    count = int(_module(kind).device_count())
    local = os.environ.get("LOCAL_RANK", "")
    return int(local) % count if local.isdecimal() else int(_module(kind).current_device())


def _number_of(device: torch.device) -> int | None:
    return cast("int | None", device.index)  # which torch's own types don't know


def _counted(count: int) -> str:
    return "is one of that kind" if count == 1 else f"are {count} of that kind"


def _refusal(device: torch.device, why: str) -> RecipeError:
    return RecipeError(
        f"there is no device {device}",
        where="device",
        why=why,
        hint="leave device out, or write cpu",
    )
