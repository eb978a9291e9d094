"""Random inputs of traced models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.ir.torch.interpreter import Inputs, flat_inputs, input_names
from graphprune.ir.torch.program import Program
from graphprune.ir.torch.sizes import ExampleSizes

# Operators that hand indices on as they are, on their way to an embedding.
_SAME_VALUES = set(
    "view reshape flatten squeeze unsqueeze slice expand contiguous clone to _to_copy alias "
    "transpose permute".split()
)


def random_inputs(program: Program, seed: int = 0) -> Inputs:
    """Inputs of the example's form and shapes.

    Floating inputs are standard normal, indices of embeddings uniform over the table's rows;
    other integers (masks, lengths) have the example's values, or 1 where the example has none.

    Args:
        program: gives the example and the graph.
        seed: of the generator.

    Returns:
        (args, kwargs).
    """
    generator = torch.Generator().manual_seed(seed)
    graph = {node.name: node for node in program.exported.graph.nodes}
    names = input_names(program.exported)
    spec = program.exported.call_spec.in_spec
    if pytree.tree_leaves(program.example):
        leaves = flat_inputs(program.exported, program.example)
    else:  # a file that holds no example
        sizes = ExampleSizes(program.exported)
        leaves = [_blank(graph[name].meta.get("val"), sizes) for name in names]
    drawn = [
        _draw(leaf, graph[name], generator) if isinstance(leaf, Tensor) else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    if spec is None:
        return tuple(drawn), {}
    args, kwargs = pytree.tree_unflatten(drawn, spec)
    return args, kwargs


def _blank(value: Any, sizes: ExampleSizes) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty([sizes.size(s).size for s in value.shape], dtype=value.dtype, device="meta")


def _draw(example: Tensor, node: fx.Node, generator: torch.Generator) -> Tensor:
    device = "cpu" if example.is_meta else example.device
    if example.is_floating_point() or example.is_complex():
        dtype = torch.complex64 if example.is_complex() else torch.float32
        values = torch.randn(example.shape, generator=generator, dtype=dtype)
        return values.to(device=device, dtype=example.dtype)
    rows = _table_rows(node)
    if rows is not None and example.dtype != torch.bool:
        values = torch.randint(0, rows, example.shape, generator=generator)
        return values.to(device=device, dtype=example.dtype)
    return torch.ones(example.shape, dtype=example.dtype) if example.is_meta else example


def _table_rows(node: fx.Node) -> int | None:
    """Rows of the smallest embedding that `node` indexes as it is, or None."""
    rows: list[int] = []
    waiting = [node]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            schema = getattr(user.target, "_schema", None)
            name = schema.name.removeprefix("aten::") if schema is not None else ""
            if name == "embedding" and user.args[1] is value:
                rows.append(int(user.args[0].meta["val"].shape[0]))  # type: ignore[union-attr]
            elif name in _SAME_VALUES and user.args[0] is value:
                waiting.append(user)
    return min(rows, default=None)
