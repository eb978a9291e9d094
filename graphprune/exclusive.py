"""One thread at a time where torch and transformers keep what they are doing for the whole process.

``torch.export`` has one slot for the graph that is being traced, transformers changes its own
functions while it builds a model, and Python has one list of warning filters. Everything of ours
that comes near them holds one lock; long work with data doesn't, and relies on none of them.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")


class _Turn:
    """A lock that its holder may take again, and that a forked process begins without."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()


_turn = _Turn()


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other thread is inside, and keep the others out."""
    with _turn.lock:
        yield


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Have `function` run in one thread at a time, and while no other one is `alone`."""

    @functools.wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with alone():
            return function(*args, **kwargs)

    return waiting


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let torch create floating tensors in `dtype` where no other is named.

    The whole process sees it, so that it is for what can't be told its dtype in another way.
    """
    import torch

    with alone():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
