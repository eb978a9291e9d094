"""Layers cut out of an ONNX graph: their inputs take the places of their results."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphprune.analysis.structure import Block
from graphprune.ir.onnx.edit import Editor
from graphprune.ir.onnx.scopes import rename_modules
from graphprune.rewrite.renumber import Shifts, shifted


def bypass(model: ir.Model, blocks: Iterable[Block]) -> None:
    """Cut blocks out of a model in place, with everything that nothing else reads.

    A result of a block that the model returns keeps its name.

    Args:
        model: as `read_onnx` gives it.
        blocks: the blocks.
    """
    graph = model.graph
    places = {v.name: i for i, node in enumerate(graph) for v in node.outputs}
    # The entry of one may be the exit of another before it, of a stack or of branches.
    blocks = sorted(blocks, key=lambda b: places[b.exit])
    if not blocks:
        return
    editor = Editor(graph)
    values = {v.name or "": v for v in (*graph.inputs, *graph.initializers.values())}
    values |= {v.name or "": v for node in graph for v in node.outputs}
    for block in blocks:
        entry, exit_ = values[block.entry], values[block.exit]
        if exit_ in graph.outputs:
            entry = _named(editor, exit_, entry)
        exit_.replace_all_uses_with(entry, replace_graph_outputs=True)
        values[block.exit] = entry
    RemoveUnusedNodesPass()(model)


def renumber_layers(graph: ir.Graph, shifts: Shifts) -> None:
    """Give the operators of layers behind removed ones their new paths.

    What other layers read of a removed one is still there; no two operators have the same name.
    """
    taken: set[str] = set()
    for node in graph if shifts else ():
        rename_modules(node, lambda path: shifted(path, shifts))
        name, number = node.name or "", 1
        while node.name and node.name in taken:
            node.name = f"{name}_again{number}"
            number += 1
        taken.add(node.name or "")


def _named(editor: Editor, value: ir.Value, instead: ir.Value) -> ir.Value:
    """`instead` under the name of a value that the model returns."""
    node = value.producer()
    assert node is not None  # a result of a block
    name = value.name or ""
    value.name = editor.name(f"{name}_removed")
    copy = editor.after(node, "Identity", [instead])
    copy.name, copy.type, copy.shape = name, value.type, value.shape
    return copy
