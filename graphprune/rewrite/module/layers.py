"""The sizes that torch.nn layers keep as attributes, read off the shapes of their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, Shape]]
Pairs = Sequence[tuple[int, int]]

NAMED_AFTER_WEIGHT: Sequence[tuple[type[nn.Module], tuple[str, ...]]] = (
    (nn.Linear, ("out_features", "in_features")),
    (nn.Bilinear, ("out_features", "in1_features", "in2_features")),
    (nn.Embedding, ("num_embeddings", "embedding_dim")),
    (nn.EmbeddingBag, ("num_embeddings", "embedding_dim")),
    (nn.PReLU, ("num_parameters",)),
)
"""Layers whose attributes are the dimensions of their weight, in order."""


@dataclass(frozen=True)
class LayerSizes:
    """The size attributes of a layer.

    Attributes:
        names: Attributes that are settled here, or that are no sizes.
        options: Label to the possible edits, likeliest first; one of them is right.
    """

    names: frozenset[str] = frozenset()
    options: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def layer_sizes(layer: nn.Module, shapes: Shapes, pairs: Pairs) -> LayerSizes:
    """Settle the size attributes of a torch.nn layer, or of a subclass of one.

    Args:
        layer: A module that still has its old attributes.
        shapes: Its own tensors: name to (old, new) shape.
        pairs: (old, new) sizes in its scope, for layers without parameters.

    Returns:
        Nothing for modules that are no such layers.
    """
    # A norm may have no weight, and a parametrized layer has it elsewhere.
    old, new = shapes.get("weight") or shapes.get("running_mean") or ((), ())
    if not new:
        return LayerSizes()
    for kind, names in NAMED_AFTER_WEIGHT:
        if isinstance(layer, kind):
            return _settled(layer, [dict(zip(names, new, strict=True))])
    if isinstance(layer, _ConvNd):
        return _settled(layer, _conv(layer, old, new, pairs))
    if isinstance(layer, _NormBase):
        return _settled(layer, [{"num_features": new[0]}])
    if isinstance(layer, nn.GroupNorm):
        return _settled(layer, _group_norm(layer, new[0], pairs))
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return _settled(layer, [{"normalized_shape": new}])
    return LayerSizes()


def _settled(layer: nn.Module, options: Sequence[Mapping[str, Any]]) -> LayerSizes:
    """Leave out what doesn't change; a subclass may have attributes of its own beside these."""
    changed = [
        {name: value for name, value in option.items() if getattr(layer, name) != value}
        for option in options
    ]
    if type(layer).__module__.startswith("torch.nn"):
        names = frozenset(vars(layer))
    else:
        private = {name for name in vars(layer) if name.startswith("_")}
        constants = getattr(type(layer), "__constants__", ())
        names = frozenset({*constants, *private, *options[0]})
    return LayerSizes(names, {"sizes": changed} if any(changed) else {})


def _conv(layer: _ConvNd, old: Shape, new: Shape, pairs: Pairs) -> list[Mapping[str, Any]]:
    """A weight is [out, in / groups, ...], a transposed one [in, out / groups, ...]."""
    first, second = ("out_channels", "in_channels")
    if layer.transposed:
        first, second = second, first
    return [
        {first: new[0], second: new[1] * groups, "groups": groups}
        for groups in _groups(layer.groups, old[0], new[0], pairs)
    ]


def _group_norm(layer: nn.GroupNorm, channels: int, pairs: Pairs) -> list[Mapping[str, Any]]:
    groups = _groups(layer.num_groups, layer.num_channels, channels, pairs)
    return [{"num_channels": channels, "num_groups": count} for count in groups]


def _groups(groups: int, old: int, new: int, pairs: Pairs) -> list[int]:
    """The possible numbers of groups once `old` channels have become `new`.

    Either whole groups have left, or every group has lost as many channels, or both. A number of
    groups that is known to have changed speaks for the first, and so does a group of a single
    channel.
    """
    if old == new:
        return [groups]
    size = old // groups
    whole = [new // size] if new % size == 0 else []
    thinned = [groups] if new % groups == 0 else []
    both = [n for old_groups, n in pairs if old_groups == groups and n and new % n == 0]
    both = [n for n in both if n < groups and new // n < size]
    if size == 1 or (whole and (groups, whole[0]) in pairs):
        return list(dict.fromkeys(whole + thinned + both))
    return list(dict.fromkeys(thinned + whole + both))
