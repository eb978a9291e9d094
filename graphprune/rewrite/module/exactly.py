"""A model's own code with every number in one dtype, beside threads that know nothing of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphprune.ir.torch.floats import settled
from graphprune.rewrite.module.reload import Widened

_WHOLE = ("aten::randint", "aten::randint_like", "aten::randperm")
"""Operators that draw whole numbers unless another dtype is asked for."""


class Exactly(Widened):  # type: ignore[no-untyped-call]
    """As `Widened`, also for numbers that operators make in torch's default dtype.

    The default belongs to the whole process, other threads included, and stays as it is.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` with other dtypes."""
        kwargs = kwargs or {}
        if _any_floating((args, kwargs)) or func._schema.is_mutable:
            return super().__torch_dispatch__(func, types, args, kwargs)
        # One that draws numbers runs once, and the others again if their result is floating.
        if torch.Tag.nondeterministic_seeded in func.tags:
            makes_floats = func._schema.name not in _WHOLE or kwargs.get("dtype") is not None
        else:
            makes_floats = _any_floating(super().__torch_dispatch__(func, types, args, kwargs))
        if makes_floats:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            func, kwargs = settled(func, given, self.dtype)
            args = ()
        return super().__torch_dispatch__(func, types, args, kwargs)


def _any_floating(values: Any) -> bool:
    return any(
        isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
        for x in pytree.tree_leaves(values)
    )
