"""Masks of whole tensors, and operators whose value depends on which coordinates exist.

In the masked model a removed coordinate is a zero. Sums, matrix products, convolutions and
attention don't notice zeros; means, norms, softmax and extremes do. Each of these has a formula
here that leaves the tensor at full size and leaves removed coordinates out by what it counts or by
what it fills in for them. None of them cuts a tensor, so that they share nothing with the rewriter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from graphprune.axes import Atom, BoolArray, Dims, Expr, Keep, Ragged, atoms, mask, normal, touched
from graphprune.errors import VerifyError
from graphprune.ops.registry import RuleTable


class Masks:
    """Which coordinates of whole tensors stay, at the sizes of one run.

    A dynamic dimension may have another size than in the example. It is never pruned itself, but
    may be a factor of a pruned axis (batch * heads), so its actual size is learnt from the values
    that have it as a dimension.
    """

    def __init__(self, keep: Keep) -> None:
        """Masks under `keep`."""
        self._keep = keep
        self._lengths: dict[Atom, int] = {}
        self._vectors: dict[tuple[Expr, int], Tensor] = {}

    def observe(self, dims: Dims, shape: Sequence[int]) -> None:
        """Learn sizes from a value with the axes `dims`."""
        for d, length in zip(dims, shape, strict=True):
            e = normal(d)
            if isinstance(e, Atom) and e.frozen and e.size != length:
                self._lengths[e] = length

    def whole(self, dims: Dims, shape: Sequence[int], name: str) -> Tensor | None:
        """The mask of a tensor.

        Args:
            dims: its axes.
            shape: its sizes.
            name: its name, for messages.

        Returns:
            A boolean tensor that broadcasts to `shape`, or None where everything stays.

        Raises:
            VerifyError: the size of a dynamic dimension inside a pruned axis is unknown.
        """
        ragged = {a: kept for d in dims for a in atoms(d)
                  if isinstance(kept := self._keep.get(a), Ragged)}  # fmt: skip
        together = {*ragged, *(kept.outer for kept in ragged.values())}
        joint = [i for i, d in enumerate(dims) if not together.isdisjoint(atoms(d))]
        factors = []
        for i, d in enumerate(dims):
            if i not in joint and touched(d, self._keep):
                key = (normal(d), shape[i])
                if key not in self._vectors:
                    self._vectors[key] = torch.from_numpy(
                        self._vector(d, shape[i], self._keep, name)
                    )
                factors.append(_along(self._vectors[key], i, len(dims)))
        if joint:
            factors.append(self._joint(dims, shape, joint, ragged, name))
        return functools.reduce(torch.logical_and, factors) if factors else None

    def _joint(
        self,
        dims: Dims,
        shape: Sequence[int],
        joint: Sequence[int],
        ragged: Mapping[Atom, Ragged],
        name: str,
    ) -> Tensor:
        """The mask along dimensions that share ragged axes: a union over the outer indices."""
        result = torch.zeros((), dtype=torch.bool)
        for keep in _unragged(self._keep, ragged):
            vectors = [
                _along(torch.from_numpy(self._vector(dims[i], shape[i], keep, name)), i, len(dims))
                for i in joint
            ]
            result = result | functools.reduce(torch.logical_and, vectors)
        return result

    def _vector(self, e: Expr, length: int, keep: Keep, name: str) -> BoolArray:
        resized = [a for a in atoms(e) if a in self._lengths]
        if resized:
            keep = {**keep, **{a: np.ones(self._lengths[a], dtype=bool) for a in resized}}
        vector = mask(e, keep)
        if len(vector) != length:
            raise VerifyError(
                "the size of a pruned axis can't be followed",
                where=name,
                why=f"its axis {normal(e)!r} has {length} indices in this input",
                hint="verify with inputs of the example's shapes",
            )
        return vector


def _unragged(keep: Keep, ragged: Mapping[Atom, Ragged]) -> Iterator[Keep]:
    """`keep` at each single index of the outer axes, where ragged masks are plain ones."""
    if not ragged:
        yield keep
        return
    outer = next(iter(ragged.values())).outer
    inner = {a: kept for a, kept in ragged.items() if kept.outer is outer}
    rest = {a: kept for a, kept in ragged.items() if kept.outer is not outer}
    stays = keep.get(outer, np.ones(outer.size, dtype=bool))
    if isinstance(stays, Ragged):
        raise ValueError("a ragged axis inside another ragged axis")
    for i in np.flatnonzero(stays):
        only = np.arange(outer.size) == i
        rows = {a: kept.mask[i] for a, kept in inner.items()}
        yield from _unragged({**keep, outer: only, **rows}, rest)


def _along(vector: Tensor, dim: int, rank: int) -> Tensor:
    return vector.reshape([-1 if i == dim else 1 for i in range(rank)])


@dataclass(frozen=True, slots=True)
class Call:
    """One use of an operator whose first operand has removed coordinates, zero in it.

    Attributes:
        target: the operator.
        arguments: what the graph gives it, by schema name.
        operand: name of the first operand, "self" or "input".
        kept: boolean, broadcasts to the first operand: which coordinates stay.
    """

    target: torch._ops.OpOverload[..., Any]
    arguments: Mapping[str, Any]
    operand: str
    kept: Tensor

    @property
    def x(self) -> Tensor:
        """The first operand."""
        tensor: Tensor = self.arguments[self.operand]
        return tensor

    def get(self, name: str) -> Any:
        """The argument `name`, the schema's default, or None where there is no such argument."""
        if name in self.arguments:
            return self.arguments[name]
        for argument in self.target._schema.arguments:
            if argument.name == name:
                return argument.default_value
        return None

    def native(self, x: Tensor | None = None) -> Any:
        """The operator itself, on `x` in place of the first operand."""
        if x is None:
            return self.target(**self.arguments)
        return self.target(**{**self.arguments, self.operand: x})

    def filled(self, value: float | int | bool) -> Tensor:
        """The first operand with `value` at its removed coordinates."""
        return self.x.masked_fill(~self.kept, value)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that the operator works along, counted from the front; () is all."""
        given = self.get("dim")
        rank = self.x.dim()
        if given is None or (not isinstance(given, int) and not given):
            return tuple(range(rank))
        return tuple(d % rank for d in ([given] if isinstance(given, int) else given))

    def prunes(self, dims: Sequence[int]) -> bool:
        """Whether coordinates are missing along any of `dims`."""
        return any(self.kept.shape[d] != 1 for d in dims)

    def squeezed(self, x: Tensor) -> Tensor:
        """`x`, reduced with its dimensions kept, as the operator's ``keepdim`` asks."""
        return x if self.get("keepdim") else x.squeeze(self.dims)


Formula: TypeAlias = Callable[[Call], Any]


def moments(x: Tensor, kept: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and deviations over the kept coordinates.

    Args:
        x: any shape, zero at removed coordinates.
        kept: boolean, broadcasts to `x`.
        dims: reduced dimensions.

    Returns:
        The count (at least 1) and the mean with `dims` of size 1, and ``x - mean``, zero at
        removed coordinates.
    """
    count = kept.sum(tuple(dims), keepdim=True)
    for d in dims:
        if kept.shape[d] == 1:
            count = count * x.shape[d]
    count = count.clamp(min=1).to(x.real.dtype if x.is_complex() else x.dtype)
    mean = x.sum(tuple(dims), keepdim=True) / count
    return count, mean, (x - mean).masked_fill(~kept, 0)


def _lowest(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return torch.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def _one(dtype: torch.dtype) -> int:
    del dtype
    return 1


def neutral(value: Callable[[torch.dtype], float | int | bool]) -> Formula:
    """The operator itself, once removed coordinates hold what can't change its result."""

    def formula(call: Call) -> Any:
        if not call.prunes(call.dims):
            return call.native()
        return call.native(call.filled(value(call.x.dtype)))

    return formula


def _extreme(value: Callable[[torch.dtype], float | int | bool]) -> Formula:
    """`max` and `min`, which with a second tensor are elementwise."""
    reduced = neutral(value)
    return lambda call: call.native() if "other" in call.arguments else reduced(call)


def _top_k(call: Call) -> Any:
    return neutral(_lowest if call.get("largest") else _highest)(call)


def _vector_norm(call: Call) -> Any:
    order = call.get("ord" if "linalg" in call.target._schema.name else "p")
    # Zeros add nothing to a norm of positive order and aren't counted by the one of order zero.
    return (
        neutral(_highest)(call) if isinstance(order, int | float) and order < 0 else call.native()
    )


def _mean(call: Call) -> Any:
    if not call.prunes(call.dims):
        return call.native()
    dtype = call.get("dtype")
    x = call.x if dtype is None else call.x.to(dtype)
    return call.squeezed(moments(x, call.kept, call.dims)[1])


def _spread(*, root: bool, with_mean: bool) -> Formula:
    """Variance or standard deviation, alone or in a pair with the mean."""

    def formula(call: Call) -> Any:
        if not call.prunes(call.dims):
            return call.native()
        correction = call.get("correction")
        if correction is None:
            correction = 0 if call.get("unbiased") is False else 1
        count, mean, centred = moments(call.x, call.kept, call.dims)
        squares = centred.abs().square().sum(call.dims, keepdim=True)
        spread = call.squeezed(squares / (count - correction).clamp(min=0))
        spread = spread.sqrt() if root else spread
        return (spread, call.squeezed(mean)) if with_mean else spread

    return formula


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _trailing(call: Call) -> tuple[int, ...]:
    rank = call.x.dim()
    return tuple(range(rank - len(call.get("normalized_shape")), rank))


def _layer_norm(call: Call) -> Any:
    dims = _trailing(call)
    if not call.prunes(dims):
        return call.native()
    count, mean, centred = moments(call.x, call.kept, dims)
    inverse = (centred.square().sum(dims, keepdim=True) / count + call.get("eps")).rsqrt()
    y = _scaled(centred * inverse, call.get("weight"), call.get("bias"))
    return (y, mean, inverse) if len(call.target._schema.returns) > 1 else y


def _rms_norm(call: Call) -> Any:
    dims = _trailing(call)
    if not call.prunes(dims):
        return call.native()
    eps = call.get("eps")
    eps = torch.finfo(call.x.dtype).eps if eps is None else eps
    mean_square = moments(call.x.square(), call.kept, dims)[1]
    inverse = (mean_square + eps).rsqrt()
    y = _scaled(call.x * inverse, call.get("weight"), None)
    return (y, inverse) if len(call.target._schema.returns) > 1 else y


def _group_norm(call: Call) -> Any:
    x = call.x
    if not call.prunes(range(1, x.dim())):
        return call.native()
    groups = call.get("num_groups")
    grouped = (x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    kept = call.kept.expand(x.shape).reshape(grouped)
    count, _, centred = moments(x.reshape(grouped), kept, (2,))
    variance = centred.square().sum(2, keepdim=True) / count
    y = (centred * (variance + call.get("eps")).rsqrt()).reshape(x.shape)
    per_channel = (-1, *(1 for _ in x.shape[2:]))
    parameters = [call.get(name) for name in ("weight", "bias")]
    weight, bias = [None if p is None else p.reshape(per_channel) for p in parameters]
    return _scaled(y, weight, bias)


FORMULAS: Mapping[str, Formula] = {
    "aten.mean": _mean,
    "aten.var": _spread(root=False, with_mean=False),
    "aten.std": _spread(root=True, with_mean=False),
    "aten.var_mean": _spread(root=False, with_mean=True),
    "aten.std_mean": _spread(root=True, with_mean=True),
    "aten.layer_norm": _layer_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten.rms_norm": _rms_norm,
    "aten._fused_rms_norm": _rms_norm,
    "aten.group_norm": _group_norm,
    "aten.linalg_vector_norm": _vector_norm,
    "aten.norm": _vector_norm,
    "aten.softmax": neutral(_lowest),
    "aten._softmax": neutral(_lowest),
    "aten._safe_softmax": neutral(_lowest),
    "aten.log_softmax": neutral(_lowest),
    "aten._log_softmax": neutral(_lowest),
    "aten.logsumexp": neutral(_lowest),
    "aten.amax": neutral(_lowest),
    "aten.amin": neutral(_highest),
    "aten.max": _extreme(_lowest),
    "aten.min": _extreme(_highest),
    "aten.argmax": neutral(_lowest),
    "aten.argmin": neutral(_highest),
    "aten.topk": _top_k,
    "aten.all": neutral(_one),
    "aten.prod": neutral(_one),
}
for _name, _registered in FORMULAS.items():
    RuleTable[Formula]("masked", "aten.").add(_name, _registered)
