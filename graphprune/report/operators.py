"""The operators that graphprune knows, and the rules that each of them has."""

from __future__ import annotations

from graphprune.ops import onnx, registry, torch  # noqa: F401  (they register axis rules)
from graphprune.ops.registry import OpDef
from graphprune.oracle import masked_onnx, masked_ops  # noqa: F401  (they register formulas)
from graphprune.rewrite import onnx as onnx_sizes  # noqa: F401  (they register rules of sizes)
from graphprune.rewrite import sizes  # noqa: F401


def operators() -> dict[str, OpDef]:
    """Every operator with a rule, by name: "aten.view", "onnx.Reshape", "mylib.scaled_add".

    Those that torch tags as pointwise need no rule, and aren't among them.

    Raises:
        GraphPruneError: what an installed package registers can't be loaded.
    """
    return {name: registry.OPERATORS.find(name) for name in registry.OPERATORS}
