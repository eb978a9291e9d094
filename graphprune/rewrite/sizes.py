"""Constants in a torch graph that carry sizes, recomputed from the axes of the values they shape.

One rule per operator with such constants. A rule returns new arguments for the call; an operator
without a rule keeps its arguments.
"""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import fx

from graphprune.axes import (
    UNIT,
    BoolArray,
    Dims,
    Expr,
    Keep,
    Ragged,
    Sum,
    atoms,
    count,
    mask,
    normal,
    touched,
)
from graphprune.ops import Typing
from graphprune.ops.families.pointwise import axes_of
from graphprune.ops.registry import RuleTable

Arguments = dict[str, Any]
SizeRule = Callable[["Call"], None]

END = torch.iinfo(torch.int64).max


@dataclass
class Call:
    """A call whose size arguments are being rewritten.

    Attributes:
        node: the call in the original graph.
        arguments: by schema name; changed in place.
        typing: axes of the original graph.
        keep: what stays.
        target: the operator to call instead, if it changes.
        constant: what takes the place of the call, if it is the same on all inputs; in float64
            where the call's dtype can't hold it, so that it can be run in either.
    """

    node: fx.Node
    arguments: Arguments
    typing: Typing
    keep: Keep
    target: Any = None
    constant: torch.Tensor | None = None

    def dims(self, name: str) -> Dims:
        """Axes of the tensor argument `name`."""
        return self.typing.values[self.arguments[name].name][0]

    @property
    def results(self) -> tuple[Dims, ...]:
        """Axes of the results."""
        return self.typing.values[self.node.name]

    def kept(self, e: Expr) -> int:
        """Number of indices of `e` that stay."""
        return count(e, self.keep)

    def mask(self, e: Expr) -> BoolArray:
        """Which indices of `e` stay.

        Where that differs between the indices of an axis in another dimension, those of its first
        index; the places of boundaries are the same for all.
        """
        around = set(atoms(e))
        keep = dict(self.keep)
        for atom, kept in self.keep.items():
            if isinstance(kept, Ragged) and kept.outer not in around:
                keep[atom] = kept.mask[0]
        return mask(e, keep)

    def touched(self, e: Expr) -> bool:
        """Whether `e` loses indices."""
        return touched(e, self.keep)

    def shape(self, given: Sequence[Any], dims: Dims, result: torch.Tensor) -> list[Any]:
        """A shape argument for a tensor with axes `dims`; static sizes become literal numbers."""
        sizes: list[Any] = []
        for old, e, size in zip(given, dims, result.shape, strict=True):
            if _is_static(old, size):
                sizes.append(self.kept(e))
            elif self.touched(e) and isinstance(old, fx.Node):
                sizes.append(self.dynamic(old, e, free=-1 not in given and -1 not in sizes))
            else:
                sizes.append(old)
        return sizes

    def dynamic(self, old: fx.Node, e: Expr, *, free: bool) -> Any:
        """The size of a pruned axis with a dynamic factor; -1 where that is `free`."""
        if isinstance(normal(e), Sum):
            raise ValueError(f"{self.node.name} has a dynamic and a pruned part in one dimension")
        factor = Fraction(self.kept(e), e.size) / self._factor(old)
        if factor == 1:
            return old
        return -1 if free else Scaled(old, factor)

    def _factor(self, size: Any) -> Fraction:
        """By how much a size that the graph computes changes by itself."""
        if not isinstance(size, fx.Node):
            return Fraction(1)
        if str(getattr(getattr(size.target, "_schema", None), "name", "")) == "aten::sym_size":
            tensor, dim = size.args
            e = self.typing.values[tensor.name][0][dim]  # type: ignore[union-attr,index]
            return Fraction(self.kept(e), e.size)
        factors = [self._factor(part) for part in size.args]
        if size.target is python_operator.mul:
            return math.prod(factors, start=Fraction(1))
        if any(f != 1 for f in factors):
            raise ValueError(f"{self.node.name} computes with the size of a pruned axis")
        return Fraction(1)


@dataclass(frozen=True)
class Scaled:
    """A dynamic size of the original graph, times `factor` in the slim one."""

    size: fx.Node
    factor: Fraction


@dataclass(frozen=True)
class Dense:
    """A copy of a value without gaps in memory."""

    value: fx.Node


@dataclass(frozen=True, eq=False)
class Constant:
    """New values in place of a constant of the original graph."""

    value: torch.Tensor
    instead: fx.Node


def _is_static(given: Any, size: int | torch.SymInt) -> bool:
    """Whether callers can't change a size; that of a literal may be symbolic beside a -1."""
    return isinstance(size, int) or (isinstance(given, int) and given != -1)


_rule = RuleTable[SizeRule]("sizes", "aten.").rule


@_rule("view", "reshape", "_unsafe_view", "view_copy", "zeros", "ones", "full", "empty",
       "new_zeros", "new_ones", "new_full", "new_empty")  # fmt: skip
def _shape(call: Call) -> None:
    key = "shape" if "shape" in call.arguments else "size"
    given = call.arguments.get(key)  # a view as another dtype has none
    if isinstance(given, list | tuple):
        call.arguments[key] = call.shape(given, call.results[0], call.node.meta["val"])


@_rule("expand", "broadcast_to", "expand_copy")
def _expand(call: Call) -> None:
    key = "size" if "size" in call.arguments else "shape"
    sizes: list[Any] = []
    for old, e in zip(call.arguments[key], call.results[0], strict=True):
        if isinstance(old, int):
            sizes.append(old if old == -1 else call.kept(e))
        else:
            sizes.append(call.dynamic(old, e, free=False) if call.touched(e) else old)
    call.arguments[key] = sizes


@_rule("unflatten")
def _unflatten(call: Call) -> None:
    dim = call.arguments["dim"] % len(call.dims("self"))
    n = len(call.arguments["sizes"])
    result = call.node.meta["val"]
    sizes = call.results[0][dim : dim + n]
    call.arguments["sizes"] = [
        call.kept(e) if _is_static(old, size) else old
        for old, e, size in zip(
            call.arguments["sizes"], sizes, result.shape[dim : dim + n], strict=True
        )
    ]


@_rule("squeeze")
def _squeeze(call: Call) -> None:
    """What was of size 1 is named, since other dimensions may have a single index left."""
    x = call.dims("self")
    if any(call.touched(e) for e in x):
        chosen = axes_of(call.arguments.get("dim"), len(x))
        call.target = torch.ops.aten.squeeze.dims
        call.arguments["dim"] = [i for i in chosen if x[i].size == 1]


@_rule("repeat", "tile")
def _repeat(call: Call) -> None:
    key = "repeats" if "repeats" in call.arguments else "dims"
    source, result = call.dims("self"), call.results[0]
    given = call.arguments[key]
    result = result[len(result) - len(given) :]  # tile may name the last dimensions only
    lead = len(given) - len(source)
    call.arguments[key] = [
        call.kept(result[i]) // (call.kept(source[i - lead]) if i >= lead else 1)
        if isinstance(n, int) and call.touched(result[i])
        else n
        for i, n in enumerate(given)
    ]


@_rule("repeat_interleave")
def _repeat_interleave(call: Call) -> None:
    if not isinstance(call.arguments["repeats"], int):  # a dynamic number, or a tensor
        return
    dim = call.arguments["dim"]
    whole, part = call.results[0][dim], call.dims("self")[dim]
    call.arguments["repeats"] = call.kept(whole) // call.kept(part)
    if isinstance(call.arguments.get("output_size"), int):  # what the others say already
        call.arguments["output_size"] = call.kept(whole)


@_rule("slice", "narrow", "slice_copy", "slice_scatter")
def _slice(call: Call) -> None:
    e = call.dims("self")[call.arguments.get("dim", 0)]
    if not call.touched(e):
        return
    kept = call.mask(e)
    start = call.arguments.get("start") or 0
    if "length" in call.arguments:
        start = start + e.size if start < 0 else start
        stop = start + call.arguments["length"]
        call.arguments["start"] = int(kept[:start].sum())
        call.arguments["length"] = int(kept[start:stop].sum())
        return
    end = call.arguments.get("end")
    if call.arguments.get("step", 1) != 1:  # whole blocks of `step` places go or stay
        call.arguments["end"] = END
        return
    start = start + e.size if start < 0 else start
    call.arguments["start"] = int(kept[:start].sum())
    if end is not None and end < e.size:
        end = end + e.size if end < 0 else end
        call.arguments["end"] = int(kept[:end].sum())


@_rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split",
       "split_copy", "split_with_sizes_copy")  # fmt: skip
def _split(call: Call) -> None:
    x = call.dims("self")
    dim = call.arguments.get("dim", 0) % len(x)
    if call.touched(x[dim]):
        sizes = [call.kept(dims[dim]) for dims in call.results]
        call.target = torch.ops.aten.split_with_sizes.default
        call.arguments = {
            "self": call.arguments["self"],
            "split_sizes": sizes,
            "dim": dim,
        }


@_rule("roll")
def _roll(call: Call) -> None:
    x, result = call.dims("self"), call.results[0]
    shifts = list(call.arguments["shifts"])
    for i, dim in enumerate(call.arguments.get("dims", ())):
        if call.touched(x[dim]):
            shifts[i] = int(call.mask(result[dim])[: shifts[i] % x[dim].size].sum())
    call.arguments["shifts"] = shifts


@_rule("pad", "constant_pad_nd")
def _pad(call: Call) -> None:
    result = call.results[0]
    amounts = list(call.arguments["pad"])
    for pair in range(len(amounts) // 2):
        e = result[len(result) - 1 - pair]
        before, after = amounts[2 * pair : 2 * pair + 2]
        if call.touched(e):
            kept = call.mask(e)
            amounts[2 * pair] = int(kept[:before].sum())
            amounts[2 * pair + 1] = int(kept[len(kept) - after :].sum())
    call.arguments["pad"] = amounts


@_rule("arange", "eye", "linspace", "logspace")
def _constant(call: Call) -> None:
    dims = call.results[0]
    if not any(call.touched(e) for e in dims):
        return
    points = call.typing.points.get(call.node.name, (None,))[0]
    if points is not None and points.places:  # places are counted anew
        call.arguments["end"] = call.kept(dims[0])
        return
    target: Any = call.node.target
    values = target(**call.arguments)
    if values.is_floating_point():
        exact = target(**{**call.arguments, "dtype": torch.float64})
        values = values if torch.equal(values.double(), exact) else exact
    for dim, e in enumerate(dims):
        kept = torch.from_numpy(np.flatnonzero(call.mask(e))).to(values.device)
        values = values.index_select(dim, kept)
    call.constant = values


@_rule("view_as_complex")
def _complex(call: Call) -> None:
    """Pairs have to begin at even places, which other sizes around them may not give."""
    call.arguments["self"] = Dense(call.arguments["self"])


@_rule("select", "select_copy")
def _select(call: Call) -> None:
    dim = call.arguments["dim"]
    if call.touched(call.dims("self")[dim]):  # nobody reads the values: see live_nodes
        call.arguments["index"] = 0


@_rule("index", "index_select")
def _choice(call: Call) -> None:
    """Constant places, counted among those that stay."""
    e, places = call.typing.choices.get(call.node.name, (UNIT, np.zeros(0, dtype=np.int64)))
    if not call.touched(e):
        return
    kept = call.mask(e)
    numbers = torch.from_numpy((np.cumsum(kept) - 1)[places[kept[places]]])
    if "index" in call.arguments:
        call.arguments["index"] = Constant(numbers, call.arguments["index"])
    else:
        call.arguments["indices"] = [
            i if i is None else Constant(numbers, i) for i in call.arguments["indices"]
        ]


@_rule("one_hot")
def _one_hot(call: Call) -> None:
    call.arguments["num_classes"] = call.kept(call.results[0][-1])


@_rule("histc")
def _histogram(call: Call) -> None:
    bins = call.results[0][0]
    if call.touched(bins):
        call.arguments["bins"] = call.kept(bins)
        call.arguments["max"] = call.kept(bins) - 1


@_rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _normalized_shape(call: Call) -> None:
    x = call.dims("input")
    n = len(call.arguments["normalized_shape"])
    call.arguments["normalized_shape"] = [call.kept(e) for e in x[len(x) - n :]]


@_rule("channel_shuffle", "native_channel_shuffle")
def _groups_of_shuffle(call: Call) -> None:
    channels = call.mask(call.dims("self")[1]).reshape(call.arguments["groups"], -1)
    call.arguments["groups"] = int(channels.any(axis=1).sum())


@_rule("group_norm")
def _groups_of_norm(call: Call) -> None:
    channels = call.mask(call.dims("input")[1])
    groups = channels.reshape(call.arguments["num_groups"], -1)
    call.arguments["num_groups"] = int(groups.any(axis=1).sum())


@_rule("conv1d", "conv2d", "conv3d", "convolution",
       "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")  # fmt: skip
def _groups_of_convolution(call: Call) -> None:
    groups = call.arguments.get("groups", 1)
    if isinstance(groups, int) and groups > 1:  # a dynamic number isn't pruned
        channels = call.mask(call.dims("weight")[0]).reshape(groups, -1)
        call.arguments["groups"] = int(channels.any(axis=1).sum())


@_rule("scaled_dot_product_attention")
def _attention_scale(call: Call) -> None:
    qk_dim = call.dims("query")[-1]
    if call.arguments.get("scale") is None and call.touched(qk_dim):
        call.arguments["scale"] = 1 / math.sqrt(qk_dim.size)
