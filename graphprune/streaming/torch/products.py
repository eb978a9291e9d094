"""Products with weights, recognised by their operators."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphprune.ir.torch.liveness import values_read
from graphprune.streaming.core.layout import Bank, Convolution, Experts, Layout, Matrix

_SAME = frozenset("to alias detach clone contiguous lift_fresh_copy _to_copy".split())
_RESHAPES = frozenset("view reshape _unsafe_view flatten unflatten unsqueeze squeeze".split())
_RIGHT = {"linear": 1, "mm": 1, "matmul": 1, "bmm": 1, "addmm": 2, "baddbmm": 2}
_CONVOLUTIONS = frozenset("conv1d conv2d conv3d convolution".split())


@dataclass(frozen=True, slots=True)
class View:
    """How an operator sees a weight.

    Attributes:
        value: the node that the operator reads.
        swapped: whether the last two dimensions have changed places.
        chosen: the node that picks a matrix of the stack for each row; None for the weight itself.
    """

    value: fx.Node
    swapped: bool = False
    chosen: fx.Node | None = None


def operator(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``; "" for what is no operator of aten."""
    name = str(getattr(getattr(node.target, "_schema", None), "name", ""))
    return name.removeprefix("aten::") if name.startswith("aten::") else ""


def bind(node: fx.Node) -> dict[str, Any]:
    """All arguments by the names of the schema, with their defaults."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: v for a, v in zip(arguments, node.args, strict=False)}
    return given | dict(node.kwargs)


def rank(node: fx.Node) -> int:
    """Number of dimensions of a value; -1 if it is no tensor."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1


def followed(
    node: fx.Node, live: Collection[fx.Node], view: View | None = None
) -> Iterator[tuple[fx.Node, View | str]]:
    """The operators that use a weight, behind copies and transpositions.

    Yields:
        The operator and how it sees the weight, or why that isn't known.
    """
    view = view or View(node)
    for user in node.users:
        if user not in live or node not in values_read(user):
            continue
        name = operator(user)
        changed = _viewed(user, name, view)
        if changed is not None:
            yield from followed(user, live, changed)
        elif name in _RIGHT or name in _CONVOLUTIONS:
            yield user, view
        else:
            yield user, f"{name or user.op} reads it too, which is no product with it alone"


def _viewed(user: fx.Node, name: str, view: View) -> View | None:
    """The view behind `user`, if it does nothing but show the weight in another way."""
    if name in _SAME:
        return replace(view, value=user)
    n = rank(view.value)
    swapped = replace(view, value=user, swapped=not view.swapped)
    if name in ("t", "numpy_T") and n == 2:
        return swapped
    if name in ("mT", "transpose"):
        dims = {d % n for d in user.args[1:3] if isinstance(d, int)} or {n - 1, n - 2}
        return swapped if dims == {n - 1, n - 2} else None
    if name == "permute":
        order = [d % n for d in bind(user)["dims"]]
        return swapped if order == [*range(n - 2), n - 1, n - 2] else None
    stack = n == 3 and view.chosen is None and bool(user.args) and user.args[0] is view.value
    if name == "index" and stack:
        indices = bind(user)["indices"]
        chosen = indices[0] if len(indices) == 1 else None
    elif name == "index_select" and stack and bind(user)["dim"] == 0:
        chosen = bind(user)["index"]
    else:
        return None
    if not isinstance(chosen, fx.Node) or rank(chosen) != 1:
        return None
    if chosen.meta["val"].dtype not in (torch.int64, torch.int32):
        return None
    return replace(view, value=user, chosen=chosen)


def product_site(user: fx.Node, view: View) -> tuple[Layout, fx.Node] | str:
    """The layout and the other operand of a product, or why it is none that is understood."""
    name = operator(user)
    if name in _CONVOLUTIONS:
        return _convolution(user, view)
    right = _RIGHT[name]
    a, b = user.args[right - 1], user.args[right]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return f"{name} multiplies it with itself"
    if view.value not in (a, b):
        return f"{name} adds it"
    left = view.value is a
    x = b if left else a
    if name == "linear" and left:
        return "linear reads it as an activation"
    stored_in_out = view.swapped if left or name == "linear" else not view.swapped
    features = -2 if left and rank(x) > 1 else -1
    n = rank(view.value)
    if n == 2:
        return Matrix(stored_in_out, features), x
    if n != 3 or rank(x) != 3 or name == "linear":
        return f"{name} spreads it over a batch"
    size = view.value.meta["val"].shape[0]
    if view.chosen is None:
        return Bank(int(size), stored_in_out, features), x
    columns = x.meta["val"].shape[-1 if left else -2]
    if columns != 1 or name == "baddbmm":
        return f"{name} multiplies the matrices chosen of it with more than one row each"
    experts = _stack_size(view.value)
    return Experts(experts, stored_in_out, left), x


def _stack_size(value: fx.Node) -> int:
    """Number of matrices of the weight behind a choice of them."""
    while value.op != "placeholder":
        value = value.args[0]  # type: ignore[assignment]
    return int(value.meta["val"].shape[0])


def _convolution(user: fx.Node, view: View) -> tuple[Layout, fx.Node] | str:
    given = bind(user)
    x = given["input"]
    if view.swapped or view.chosen is not None or given["weight"] is not view.value or x is given[
        "weight"
    ]:  # fmt: skip
        return "a convolution reads something else than its kernel"
    if given.get("transposed"):
        return "a transposed convolution"
    shape = view.value.meta["val"].shape
    kernel = tuple(int(k) for k in shape[2:])
    stride, dilation = (_each(given[k], len(kernel)) for k in ("stride", "dilation"))
    padding = given["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]  # fmt: skip  # noqa: E501
        around = tuple((t // 2, t - t // 2) for t in total)
    else:
        around = tuple((p, p) for p in _each(padding, len(kernel)))
    sizes = [*stride, *dilation, *(p for pair in around for p in pair), given["groups"]]
    if not all(isinstance(s, int) for s in sizes):
        return "a convolution whose geometry isn't constant"
    return Convolution(kernel, stride, around, dilation, int(given["groups"])), x


def _each(values: Any, count: int) -> tuple[int, ...]:
    """One number per spatial dimension; a single one stands for all."""
    given = tuple(values) if isinstance(values, list | tuple) else (values,)
    return given * count if len(given) == 1 else given


def origin(value: fx.Node, layout: Layout) -> fx.Node:
    """The value behind copies, and for rows of features behind reshapes, that has the same rows."""
    keeps_rows = isinstance(layout, Matrix | Experts) and getattr(layout, "features", -1) == -1
    while True:
        name = operator(value)
        source = value.args[0] if value.args else None
        if not isinstance(source, fx.Node) or rank(source) < 0:
            return value
        same = name in _SAME and _floats(value, source)
        idle = name == "dropout" and not bind(value)["train"]
        if not (same or idle or (keeps_rows and name in _RESHAPES and _same_rows(value, source, layout))):  # fmt: skip  # noqa: E501
            return value
        value = source


def _floats(value: fx.Node, source: fx.Node) -> bool:
    return all(n.meta["val"].is_floating_point() for n in (value, source))


def _same_rows(value: fx.Node, source: fx.Node, layout: Layout) -> bool:
    """Whether a reshape leaves the last dimension alone; for experts also one of size 1."""
    new, old = (list(n.meta["val"].shape) for n in (value, source))
    if isinstance(layout, Experts):
        new, old = ([s for s in shape if not _is(s, 1)] for shape in (new, old))
    return (
        bool(new and old)
        and isinstance(new[-1], int)
        and _is(old[-1], new[-1])
        and rank(source) > 1
    )


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number
