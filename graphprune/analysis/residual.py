"""Residual sums of a graph of any format: what its hidden width runs along."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def residual_sums(
    nodes: Iterable[Node],
    inputs: Callable[[Node], Sequence[Node]],
    sums: Collection[Node],
    weighted: Collection[Node],
) -> list[Node]:
    """The sums ``x + f(x)`` whose f multiplies by weights all the way.

    A polynomial of x, as in some activations, is no residual sum.

    Args:
        nodes: all operators, in the order in which they run.
        inputs: the operators whose results one reads.
        sums: the additions.
        weighted: the operators that multiply by something.
    """
    places = {node: i for i, node in enumerate(nodes)}

    def computed_from(early: Node, late: Node, barriers: Collection[Node]) -> bool:
        """Whether `late` depends on `early` other than through `barriers`."""
        if late in barriers:
            return False
        waiting, seen = [late], {late}
        while waiting:
            for node in inputs(waiting.pop()):
                if node == early:
                    return True
                if node not in seen and places[node] > places[early] and node not in barriers:
                    seen.add(node)
                    waiting.append(node)
        return False

    found = []
    for node in places:
        if node in sums and len(inputs(node)) == 2:
            early, late = sorted(inputs(node), key=places.__getitem__)
            if computed_from(early, late, ()) and not computed_from(early, late, weighted):
                found.append(node)
    return found
