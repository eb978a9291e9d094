"""Modules built without memory for their parameters, in the calling thread only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


class _Here(threading.local):
    """How many blocks of `parameters_on_meta` this thread is in."""

    depth = 0


_here = _Here()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters have no memory, while buffers are computed as usual.

    Modules that other threads build meanwhile are as ever.
    """
    _listen()
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1


@cache
def _listen() -> None:
    """Hear of every parameter from now on.

    The hook stays, since taking it away could meet another thread that is just going through the
    hooks. It does nothing in threads that haven't asked.
    """
    # torch's annotation forgets that a hook may return another parameter, which its docs tell.
    register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """What a module registers instead of `parameter`; None for the parameter itself."""
    del module, name
    if not _here.depth or parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
