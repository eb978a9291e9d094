"""Shapes that an ONNX model declares for its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphprune.errors import LoadError
from graphprune.ir.onnx.shapes.sizes import Known


def check_inputs(model: ir.Model) -> None:
    """Refuse a model whose inputs have sizes below zero, but for -1, which some write for open.

    Raises:
        LoadError: one has.
    """
    for value in model.graph.inputs:
        if any(isinstance(size, int) and size < -1 for size in value.shape or ()):
            raise LoadError(
                "an input of the ONNX model has a size below zero",
                where=value.name,
                why=f"its shape is {value.shape}",
                hint="export the model again",
            )


def check_outputs(model: ir.Model, known: Mapping[str, Known]) -> None:
    """Refuse a model whose outputs can't have the shapes that it says.

    Runtimes pass over another size, but nothing that is made of the model would be valid.

    Args:
        model: the model.
        known: what is known of its values.

    Raises:
        LoadError: a fixed size of an output is another.
    """
    for value in model.graph.outputs:
        found = known.get(value.name or "")
        if found is None or value.shape is None:
            continue
        sizes = [None if size.dynamic else size.size for size in found.sizes]
        declared = [d if isinstance(d, int) else None for d in value.shape]
        if len(declared) != len(sizes):
            continue  # some exporters write [] for what they don't know, and checkers let it pass
        differ = any(
            None not in (size, said) and size != said
            for size, said in zip(sizes, declared, strict=True)
        )
        if differ:
            raise LoadError(
                "an output of the ONNX model doesn't have the shape that the model says",
                where=value.name,
                why=f"it says {_shown(declared)}, and the operators make {_shown(sizes)}",
                hint="export the model again, or correct the shape of the output in it",
            )


def _shown(sizes: list[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"
