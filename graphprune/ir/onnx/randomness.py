"""Random numbers in ONNX models: two models draw the same ones from operators of the same seed."""

from __future__ import annotations

import zlib

import onnx_ir as ir

_DRAWING = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


def draws_numbers(model: ir.Model) -> bool:
    """Whether an operator of a model may draw other numbers in every session."""
    return any(_unseeded(node) for node in model.graph.all_nodes())


def seed_operators(model: ir.Model) -> None:
    """Give each operator that draws random numbers a seed, by its result's name; in place.

    Without one, ONNX Runtime takes a seed from the operator's place in the model, which is another
    in a slim one.
    """
    for node in model.graph.all_nodes():
        if _unseeded(node):
            seed = zlib.crc32((node.outputs[0].name or "").encode()) % (1 << 20)
            node.attributes["seed"] = _seed(node, seed)


def _seed(node: ir.Node, seed: int) -> ir.Attr:
    if node.op_type == "Dropout":  # the only one that takes an integer
        return ir.AttrInt64("seed", seed)
    return ir.AttrFloat32("seed", float(seed))


def _unseeded(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in _DRAWING and "seed" not in node.attributes
