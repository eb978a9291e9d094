"""Building a model whose configuration may ask for more than anybody has.

A model is first built on the meta device, where nothing takes memory, and is given up as soon as it
has more parts than it can have. What it would take is counted before any of it is made.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

MOST_PARTS = 200_000
"""Modules and parameters of a model."""

FEW_PARTS, PARTS_OF_A_TENSOR = 20_000, 50
"""Those of a model with weights: a file may have one tensor for what are many parts."""


class TooLargeError(Exception):
    """A model is larger than it can be."""


class _Here(threading.local):
    """Parts that this thread may still register; None where nobody counts."""

    left: int | None = None


_here = _Here()


@contextmanager
def at_most(parts: int) -> Iterator[None]:
    """Build models that have at most so many modules and parameters.

    Raises:
        TooLargeError: one has more.
    """
    _listen()
    before, _here.left = _here.left, parts
    try:
        yield
    finally:
        _here.left = before


@cache
def _listen() -> None:
    """Hear of every part from now on; see `graphprune.frontends.hf.weightless`."""
    hooks.register_module_parameter_registration_hook(_count)
    hooks.register_module_module_registration_hook(_count)


def _count(module: nn.Module, name: str, part: Any) -> None:
    del module, name, part
    if _here.left is None:
        return
    _here.left -= 1
    if _here.left < 0:
        raise TooLargeError("it asks for more layers and parameters than the model can have")


def outline(build: Callable[[], nn.Module], parts: int) -> nn.Module | None:
    """A model without memory, to look at before it is built.

    Args:
        build: builds it under the default device.
        parts: modules and parameters that it may have.

    Returns:
        It; None where its class looks at values, which there are none of.

    Raises:
        TooLargeError: it has more parts, or its buffers don't fit into memory.
    """
    try:
        with torch.device("meta"), at_most(parts):
            model = build()
    except TooLargeError:
        raise
    except Exception:  # whoever builds it in earnest will see
        return None
    wanted = sum(b.numel() * b.element_size() for b in model.buffers())
    if wanted > memory():
        raise TooLargeError(
            f"it computes tensors of {wanted / 2**30:,.0f} GiB, and the machine has "
            f"{memory() / 2**30:,.0f}"
        )
    return model


def memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
