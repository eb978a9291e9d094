"""Views undone: what a tensor is after one of its views has been given new values.

For a view ``v = view(x)`` and new values of v, the inverse gives all of x: `slice_scatter` for a
slice, a permutation for a permutation, and so on. Views without an inverse of their own, and those
that may show an element several times (expand, unfold, as_strided), go by numbers: the same views
of ``arange`` say where in x each element of v lies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphprune.frontends.tracing.emitter import Emitter

aten = torch.ops.aten


@dataclass(frozen=True)
class View:
    """A step from a tensor to another name of its memory.

    Attributes:
        target: the operator.
        args: operands, nodes of the new graph among them.
        kwargs: operands by keyword, nodes of the new graph among them.
        source: the operand that is viewed.
        index: which of several results this one is; None where there is only one.
        whole: what all results look like (`val` of fx).
        same: the view is its source, element by element.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: fx.Node
    index: int | None
    whole: Any
    same: bool

    @property
    def val(self) -> torch.Tensor:
        """What this result looks like."""
        found: torch.Tensor = self.whole if self.index is None else self.whole[self.index]
        return found

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload."""
        return str(self.target._schema.name.partition("::")[2])

    @property
    def given(self) -> dict[str, Any]:
        """The operands by name, defaults filled in."""
        found: dict[str, Any] = {}
        for i, argument in enumerate(self.target._schema.arguments):
            default = argument.default_value if argument.has_default_value() else None
            found[argument.name] = self.args[i] if i < len(self.args) else default
        return found | self.kwargs

    def replay(self, emit: Emitter, source: fx.Node, *, whole: Any = None) -> fx.Node:
        """The call on another source, with all its results."""

        def operand(n: fx.Node) -> fx.Node:
            return source if n is self.source else n

        args, kwargs = fx.map_arg((self.args, self.kwargs), operand)
        return emit.call(free_of_strides(self.target), args, kwargs, val=whole)


def free_of_strides(target: Any) -> Any:
    """`reshape` for `view`: what has been written to may lie otherwise in memory."""
    views = (aten.view.default, aten._unsafe_view.default)
    return aten.reshape.default if target in views else target


Inverse = Callable[[Emitter, View, fx.Node, fx.Node], fx.Node]
"""``(emit, view, new, source)`` gives the source in which `view` shows `new`."""


def inverse(view: View) -> Inverse | None:
    """How to undo a view; None where it has to go by numbers."""
    if view.same:
        return _as_it_is
    if view.name in _PIECES and _bounds(view) is None:
        return None
    return _INVERSES.get(view.name)


def by_numbers(emit: Emitter, views: Sequence[View], new: fx.Node, source: fx.Node) -> fx.Node:
    """The tensor in which a chain of views shows `new`, whatever the views do.

    Args:
        emit: the graph.
        views: from the source outwards; none changes the dtype.
        new: what the last one shows; it has no element of the source twice.
        source: what the first one is a view of.
    """
    like = source.meta["val"]
    sizes, count = emit.sizes(source), like.numel()
    # What results look like is given, lest working it out bound the open sizes.
    number: Any = count
    if not isinstance(count, int):
        number = emit.call(aten.sym_numel.default, (source,), val=count)
    kind = {"dtype": torch.int64, "device": like.device}
    numbers = emit.call(aten.arange.default, (number,), kind, val=like.new_empty(count, **kind))
    integers = torch.empty_like(like, dtype=torch.int64)
    places = emit.call(aten.reshape.default, (numbers, sizes), val=integers)
    for view in views:
        whole = pytree.tree_map(lambda v: torch.empty_like(v, dtype=torch.int64), view.whole)
        places = view.replay(emit, places, whole=whole)
        if view.index is not None:
            chosen = whole[view.index]
            places = emit.call(operator.getitem, (places, view.index), val=chosen)
    flat, where, values = (_flattened(emit, x) for x in (source, places, new))
    args = (flat, 0, where, values)
    written = emit.call(aten.scatter.src, args, val=flat.meta["val"])
    return emit.call(aten.reshape.default, (written, sizes), val=like)


def _flattened(emit: Emitter, x: fx.Node) -> fx.Node:
    val = x.meta["val"]
    return emit.call(aten.reshape.default, (x, [-1]), val=val.new_empty(val.numel()))


def _as_it_is(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    del emit, view, source
    return new


def _piece(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    bounds = _bounds(view)
    assert bounds is not None  # `inverse` has looked
    args = (source, new, view.given["dim"], *bounds)
    return emit.call(aten.slice_scatter.default, args, val=source.meta["val"])


def _bounds(view: View) -> tuple[Any, Any, Any] | None:
    """Start, end and step of what a view shows along its ``dim``, where they are known."""
    given = view.given
    if view.name == "slice":
        return given["start"], given["end"], given["step"]
    if view.name == "narrow":
        start, length = given["start"], given["length"]
        size = view.source.meta["val"].shape[given["dim"]]
    else:
        lengths = [v.shape[given["dim"]] for v in view.whole]
        assert view.index is not None  # they have several results
        before = lengths[: view.index]
        start, length = (
            sum(before) if all(isinstance(n, int) for n in before) else None,
            lengths[view.index],
        )
        size = 0
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    if start < 0 and not isinstance(size, int):
        return None
    start += size if start < 0 else 0
    return start, start + length, 1


def _index(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    at = view.given["index"] if view.index is None else view.index
    args = (source, new, view.given["dim"], at)
    return emit.call(aten.select_scatter.default, args, val=source.meta["val"])


def _diagonal(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    args = (source, new, *(view.given[name] for name in ("offset", "dim1", "dim2")))
    return emit.call(aten.diagonal_scatter.default, args, val=source.meta["val"])


def _shape(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    del view
    return emit.call(aten.reshape.default, (new, emit.sizes(source)), val=source.meta["val"])


def _order(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    rank = source.meta["val"].dim()
    numbered = torch.empty([d + 2 for d in range(rank)], device="meta")  # no size twice, none 1
    args, kwargs = fx.map_arg(
        (view.args, view.kwargs), lambda n: numbered if n is view.source else n
    )
    order = [size - 2 for size in view.target(*args, **kwargs).shape]
    back = [order.index(d) for d in range(rank)]
    return emit.call(aten.permute.default, (new, back), val=source.meta["val"])


def _real(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    del view
    other = emit.call(aten.imag.default, (source,))
    return emit.call(aten.complex.default, (new, other), val=source.meta["val"])


def _imaginary(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    del view
    other = emit.call(aten.real.default, (source,))
    return emit.call(aten.complex.default, (other, new), val=source.meta["val"])


def _pairs(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    """Back from complex numbers to pairs, or the other way."""
    target = aten.view_as_complex if view.name == "view_as_real" else aten.view_as_real
    packed = emit.call(aten.contiguous.default, (new,))
    return emit.call(target.default, (packed,), val=source.meta["val"])


def _conjugate(emit: Emitter, view: View, new: fx.Node, source: fx.Node) -> fx.Node:
    del view
    return emit.call(aten.conj.default, (new,), val=source.meta["val"])


_PIECES = frozenset(
    ("slice", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split",
     "unsafe_split_with_sizes", "unsafe_chunk")
)  # fmt: skip

_INVERSES: dict[str, Inverse] = {
    **dict.fromkeys(_PIECES, _piece),
    "select": _index,
    "unbind": _index,
    "diagonal": _diagonal,
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten",
         "ravel", "squeeze", "unsqueeze", "atleast_1d", "atleast_2d"), _shape
    ),
    **dict.fromkeys(
        ("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim",
         "moveaxis"), _order
    ),
    "real": _real,
    "imag": _imaginary,
    "view_as_real": _pairs,
    "view_as_complex": _pairs,
    "_conj": _conjugate,
    "conj": _conjugate,
}  # fmt: skip
