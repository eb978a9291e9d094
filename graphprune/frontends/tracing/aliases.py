"""Which values of a graph may share memory, as far as operators tell."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

# Composite operators needn't declare that they may return their input, as einsum and type_as do.
# These ones compute something new.
_COMPUTING = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul "
    "batch_norm layer_norm group_norm instance_norm rms_norm softmax log_softmax prelu square selu "
    "scaled_dot_product_attention max_pool1d max_pool2d max_pool3d avg_pool1d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d one_hot "
    "lstm gru rnn_tanh rnn_relu true_divide multiply subtract divide".split()
)


class Aliases:
    """Which values of a graph may be names of one tensor: a union-find over nodes."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._members: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            self._members[node] = {node}
            for source in viewed(node):
                self._join(node, source)

    def of(self, node: fx.Node) -> set[fx.Node]:
        """All that may share memory with `node`, itself included."""
        return self._members[node]

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        small, large = sorted((self._members[a], self._members[b]), key=len)
        if small is not large:
            large |= small
            for node in small:
                self._members[node] = large


def viewed(node: fx.Node) -> list[fx.Node]:
    """The operands that a result may be a view of."""
    if node.target is operator.getitem or hides_alias(node.target):
        return node.all_input_nodes
    if not _declares_alias(node.target):
        return []
    schema = node.target._schema  # type: ignore[union-attr]
    given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    shared = [given.get(a.name) for a in schema.arguments if a.alias_info is not None]
    return [v for v in pytree.tree_leaves(shared) if isinstance(v, fx.Node)]


def _declares_alias(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def hides_alias(target: Any) -> bool:
    """Whether an operator may return an operand, or a view of one, and doesn't declare it."""
    if not isinstance(target, torch._ops.OpOverload) or _declares_alias(target):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(),  # type: ignore[no-untyped-call]
        "CompositeImplicitAutograd",
    )
    return composite and target._schema.name.removeprefix("aten::") not in _COMPUTING
