"""What a program reads: names, sizes and dtypes of its inputs, whatever graph it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from graphprune.calibration import load_tokenizer
from graphprune.masked import input_names
from graphprune.onnx_program import OnnxProgram
from graphprune.program import BaseProgram, Program
from graphprune.verification_onnx import index_bound

_INTEGERS = (torch.int64, torch.int32)

# Operators that hand token ids on as they are, on their way to a table.
_SAME = ("view", "reshape", "_to_copy", "to", "clone", "contiguous", "alias", "unsqueeze", "slice")


@dataclass(frozen=True)
class Input:
    """One tensor that a model reads.

    Attributes:
        name: as mappings of samples have it.
        shape: its sizes; None for one that may change.
        dtype: of its elements; None for what torch has no dtype for.
        bound: what its integers have to stay below, where they are looked up in a table.
        longest: the largest second size that the trace allows, where it says one.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype | None
    bound: int | None = None
    longest: int | None = None

    @property
    def is_tokens(self) -> bool:
        """Whether it may be token ids ``[batch, length]``."""
        return len(self.shape) == 2 and self.dtype in _INTEGERS


def inputs_of(program: BaseProgram) -> list[Input]:
    """The inputs of a program, in order; only what is no tensor is missing."""
    if isinstance(program, OnnxProgram):
        return list(_onnx(program))
    assert isinstance(program, Program)
    nodes = {n.name: n for n in program.exported.graph.nodes if n.op == "placeholder"}
    found = []
    for name in input_names(program.exported):
        value = nodes[name].meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes: tuple[Any, ...] = tuple(value.shape)
            shape = tuple(s if isinstance(s, int) else None for s in sizes)
            bound = _bound(nodes[name])
            found.append(Input(name, shape, value.dtype, bound, _longest(program, value)))
    return found


def token_input(inputs: Sequence[Input]) -> Input | None:
    """The input that token windows are for: the first matrix of integers, if there is one."""
    found = [i for i in inputs if i.is_tokens]
    return next((i for i in found if i.name == "input_ids"), found[0] if found else None)


def is_causal(program: BaseProgram) -> bool:
    """Whether the model reads token ids and nothing else, as causal language models do."""
    if not isinstance(program, Program):
        return False
    args, kwargs = program.example
    return not args and set(kwargs) == {"input_ids"}


def tokenizer_of(program: BaseProgram) -> Any | None:
    """The tokenizer of the checkpoint behind a program, if there is one.

    Raises:
        LoadError: it can't be opened.
    """
    source = program.source if isinstance(program, Program) else None
    if source is None or source.path is None:
        return None
    return load_tokenizer(source.path, trust=source.trust)


def _bound(node: fx.Node) -> int | None:
    """Rows of the tables that an input's integers are looked up in."""
    bounds = []
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        for user in current.users:
            name = getattr(user.target, "_opname", "")
            if name == "embedding" and user.args[1] is current:
                table = user.args[0]
                value = table.meta.get("val") if isinstance(table, fx.Node) else None
                if isinstance(value, torch.Tensor):
                    bounds.append(int(value.shape[0]))
            elif name in _SAME and user not in seen:
                seen.add(user)
                waiting.append(user)
    return min(bounds, default=None)


def _longest(program: Program, value: torch.Tensor) -> int | None:
    size: Any = value.shape[1] if value.dim() > 1 else 0
    if isinstance(size, int):
        return None
    symbol = size.node.expr
    known = program.exported.range_constraints.get(symbol)
    upper = getattr(known, "upper", None)
    return int(str(upper)) if getattr(upper, "is_Integer", False) else None  # else infinity


def _onnx(program: OnnxProgram) -> Iterator[Input]:
    for value in program.model.graph.inputs:
        name = value.name or ""
        known = program.known.get(name)
        if known is None:
            continue
        shape = tuple(None if s.dynamic else s.size for s in known.sizes)
        bound = None if known.dtype.is_floating_point() else index_bound(program, value)
        yield Input(name, shape, _dtype(known.dtype.numpy()), bound)


def _dtype(dtype: Any) -> torch.dtype | None:
    if str(dtype) == "bfloat16":
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        return None
