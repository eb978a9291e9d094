"""Which values of a graph are read for what they hold, and not for their shape only."""

from __future__ import annotations

from typing import Any

from torch import fx

# These ask a tensor for its shape, dtype or device.
_SHAPE_ONLY = frozenset(
    "sym_size sym_numel sym_stride sym_storage_offset zeros_like ones_like full_like empty_like "
    "rand_like randn_like new_zeros new_ones new_full new_empty view_as expand_as reshape_as "
    "type_as".split()
)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values some output depends on.

    Models ask intermediate tensors for their length: an operator whose result is used for nothing
    else does not fix anything.
    """
    live: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting.extend(values_read(node))
    return live


def values_read(node: fx.Node) -> list[fx.Node]:
    """The operands whose numbers matter to `node`, and not only their shape, dtype or device."""
    name = str(getattr(getattr(node.target, "_schema", None), "name", "")).removeprefix("aten::")
    if name not in _SHAPE_ONLY:
        return list(node.all_input_nodes)
    arguments: list[Any] = [*node.args, *node.kwargs.values()]
    shaped = name.endswith("_like") or name.startswith(("sym_", "new_"))
    tensor = arguments[0] if shaped else arguments[1]  # x.view_as(y) reads x
    return [n for n in node.all_input_nodes if n is not tensor]
