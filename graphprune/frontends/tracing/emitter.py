"""Writes a new fx graph beside an old one, node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx


class Emitter:
    """A graph in the making.

    Nodes that are copied keep their names, which the signature of a program and people know.

    Attributes:
        graph: the new graph.
        at: the old node whose work the next new nodes do, for where in the model they come from.
    """

    def __init__(self, old: fx.Graph) -> None:
        """An empty graph that leaves the names of `old` to copies."""
        self.graph = fx.Graph()
        self._taken = {node.name for node in old.nodes}
        self._made: list[fx.Node] = []
        self.at: fx.Node = next(iter(old.nodes))

    def copy(self, node: fx.Node, argument: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The same call of new operands."""
        new = self.graph.node_copy(node, argument)
        new.name = node.name
        return new

    def call(
        self, target: Any, args: Any, kwargs: Any = None, *, val: Any = None, name: str = ""
    ) -> fx.Node:
        """A call.

        Args:
            target: what is called.
            args: operands, nodes of the new graph among them.
            kwargs: operands by keyword, nodes of the new graph among them.
            val: what the result looks like; None works it out from what the operands look like.
            name: of a node of the old graph that isn't copied; "" makes up a new one.
        """
        kwargs = kwargs or {}
        new = self.graph.create_node("call_function", target, tuple(args), kwargs)
        new.name = name or self._free(new.name)
        self._made.append(new)
        if val is None:
            seen = fx.map_arg((tuple(args), kwargs), lambda n: n.meta["val"])
            with torch.no_grad():
                val = target(*seen[0], **seen[1])
        new.meta = {k: v for k, v in self.at.meta.items() if k not in ("val", "tensor_meta")}
        new.meta["val"] = val
        return new

    def sizes(self, x: fx.Node) -> list[int | fx.Node]:
        """The shape of `x`, dimensions that are open as nodes."""
        return [
            size
            if isinstance(size, int)
            else self.call(torch.ops.aten.sym_size.int, (x, d), val=size)
            for d, size in enumerate(x.meta["val"].shape)
        ]

    def drop_unread(self, copies: Iterable[fx.Node]) -> None:
        """Take out calls that nothing reads, of those that are new and of some copies."""
        for node in sorted({*self._made, *copies}, reverse=True):
            if not node.users:
                self.graph.erase_node(node)

    def _free(self, name: str) -> str:
        stem, number = name, 0
        while name in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        return name
