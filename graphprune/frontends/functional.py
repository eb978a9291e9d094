"""In-place operators made functional.

``x.relu_()`` where nobody looks at the old `x` again is ``x.relu()``: the operator is exchanged and
the graph stays as it was exported. Where a mutated tensor is seen through another name (a view, an
input, a buffer), torch's own functionalisation sorts it out; it also decomposes the operators that
may alias their inputs (batch norm, reshape, chunk), which have rules of their own.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
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


def functional(exported: ExportedProgram) -> ExportedProgram:
    """`exported` without in-place operators.

    Args:
        exported: may be changed.

    Returns:
        A program that computes the same values.
    """
    mutating = [n for n in exported.graph.nodes if _is_mutable(n.target)]
    if not mutating:
        return exported
    _drop_idle_dropout(exported.graph)
    places = {node: i for i, node in enumerate(exported.graph.nodes)}
    names = _Names(exported.graph.nodes)
    replacements = [_replacement(node, names, places) for node in mutating]
    if any(r is None for r in replacements):
        return _by_torch(exported, mutating, names)
    for node, target in zip(mutating, replacements, strict=True):
        old, now = node.args[0], places[node]
        node.target = target
        for user in list(old.users):
            if places[user] > now:
                user.replace_input_with(old, node)
    exported.graph_module.recompile()
    return exported


def _drop_idle_dropout(graph: fx.Graph) -> None:
    """Outside of training, dropout hands on its very input, which its schema doesn't say."""
    for node in list(graph.nodes):
        idle = node.target is torch.ops.aten.dropout.default and node.args[2] is False
        if idle and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _by_torch(
    exported: ExportedProgram, mutating: Iterable[fx.Node], names: _Names
) -> ExportedProgram:
    """The functionalisation of torch, with operators taken apart that would hide a view from it."""
    hiding: set[Any] = {
        member.target
        for node in mutating
        for value in node.all_input_nodes[:1]
        for member in names.of(value)
        if _hides_alias(member.target)
    }
    known = torch.export.default_decompositions() if hiding else {}
    functional: ExportedProgram = exported.run_decompositions({op: known[op] for op in hiding})
    return functional


class _Names:
    """Which values of a graph may be names of one tensor: a union-find over nodes."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._members: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            self._members[node] = {node}
            for source in _viewed(node):
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


def _is_mutable(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _viewed(node: fx.Node) -> list[fx.Node]:
    """The operands that a result may be a view of."""
    if node.target is python_operator.getitem or _hides_alias(node.target):
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


def _hides_alias(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or _declares_alias(target):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(),  # type: ignore[no-untyped-call]
        "CompositeImplicitAutograd",
    )
    return composite and target._schema.name.removeprefix("aten::") not in _COMPUTING


def _replacement(node: fx.Node, names: _Names, places: dict[fx.Node, int]) -> Any:
    """The functional operator to call at `node` instead, or None where others would notice."""
    old = node.args[0] if node.args else None
    target = _counterpart(node.target)
    if target is None or node.kwargs or not isinstance(old, fx.Node) or not _keeps_dtype(node):
        return None
    now = places[node]
    for other in names.of(old):
        if other.op == "placeholder":
            return None
        later = [user for user in other.users if places[user] > now]
        if other is old and any(user.op == "output" for user in later):
            return None  # the signature names it
        if other is not old and places[other] < now and later:
            return None
    return target


def _counterpart(target: Any) -> Any:
    """``aten.relu`` for ``aten.relu_``; None where there is no operator like that."""
    schema = target._schema
    space, _, name = schema.name.partition("::")
    if not name.endswith("_") or not schema.arguments or not schema.arguments[0].alias_info:
        return None
    packet = getattr(getattr(torch.ops, space), name[:-1], None)
    found = getattr(packet, schema.overload_name or "default", None)
    if found is None or found._schema.is_mutable:
        return None
    same = [str(a.type) for a in found._schema.arguments] == [str(a.type) for a in schema.arguments]
    return found if same and len(found._schema.returns) == 1 else None


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether the functional operator gives the dtype of the tensor that is written to."""
    own = node.meta.get("val")
    if not isinstance(own, torch.Tensor):
        return False
    operands = [i.meta.get("val") for i in node.all_input_nodes]
    promoting = {
        x.dtype for x in operands if isinstance(x, torch.Tensor) and (x.dim() or not own.dim())
    }
    return promoting - {torch.bool} <= {own.dtype}
