"""How large an ONNX graph becomes: counted before its functions are written out.

A function may call others many times, so that a file of a kilobyte may stand for any number of
operators. Counting takes as long as the file is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TypeAlias

import onnx_ir as ir

from graphprune.errors import LoadError

NODES = 100_000
"""Operators of a graph with those of its functions and branches; the analysis takes a millisecond
for each. Language models of a hundred layers have a tenth of it."""

FUNCTIONS = 5_000
DEPTH = 100
"""Functions that call each other in a row."""

CLASHES = 100_000_000
"""Pairs of equal names among operators and values: each name is made different from all before."""

Name: TypeAlias = tuple[str, str, str]


def check_extent(model: ir.Model, where: Path | str) -> None:
    """Refuse a graph that is too large once its functions are written out.

    Raises:
        LoadError: it has too many operators or functions, or a function calls itself.
    """
    functions = model.functions
    if len(functions) > FUNCTIONS:
        raise _too_large(f"it has {len(functions):,} functions", FUNCTIONS, where)
    bodies = {name: list(function.all_nodes()) for name, function in functions.items()}
    main = list(model.graph.all_nodes())
    calls = {name: _calls(nodes, functions) for name, nodes in bodies.items()}
    times = Counter(_calls(main, functions))
    depth = dict.fromkeys(functions, 0)
    for name in reversed(_callees_first(calls, where)):
        for callee, count in calls[name].items():
            times[callee] += times[name] * count
            depth[callee] = max(depth[callee], depth[name] + 1)
    total = len(main) + sum(times[name] * len(nodes) for name, nodes in bodies.items())
    if total > NODES:
        raise _too_large(f"with its functions written out it has {total:,} operators", NODES, where)
    deepest = max(depth.values(), default=0)
    if deepest > DEPTH:
        raise _too_large(f"{deepest} functions call each other in a row", DEPTH, where)
    named: Counter[str] = Counter()
    for name, nodes in bodies.items():
        for node in nodes:
            named[node.name or "node"] += times[name]
            for value in node.outputs:
                named[f"value {value.name or 'val'}"] += times[name]
    clashes = sum(count * count // 2 for count in named.values())
    if clashes > CLASHES:
        why = f"its functions give the same names {clashes:,} times over"
        raise _too_large(why, CLASHES, where)


def _calls(nodes: Iterable[ir.Node], functions: Iterable[Name]) -> Counter[Name]:
    return Counter(n.op_identifier() for n in nodes if n.op_identifier() in functions)


def _callees_first(calls: dict[Name, Counter[Name]], where: Path | str) -> list[Name]:
    try:
        return list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        names = " -> ".join(name for _, name, _ in error.args[1][:10])
        raise LoadError(
            "a function of the ONNX model calls itself", where=str(where), why=names
        ) from None


def _too_large(why: str, limit: int, where: Path | str) -> LoadError:
    return LoadError(
        "the ONNX graph is too large",
        where=str(where),
        why=f"{why}, and {limit:,} is the limit",
        hint="export it without functions, or write them out: onnx.inliner.inline_local_functions",
    )
