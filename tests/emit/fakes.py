"""Slim models cut by hand, for tests that must not depend on the analysis."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from graphprune.analysis.program import Source
from graphprune.checkpoints.patch import named_tensors
from graphprune.frontends.hf.load import traceable
from graphprune.rewrite.module.judge import Judge
from graphprune.rewrite.module.module import build


@dataclass
class FakeSlim:
    """What graphprune.rewrite.slim.Slim offers to emission."""

    program: Any
    weights: dict[str, torch.Tensor]
    renamed: dict[str, str]
    hints: dict[str, list[tuple[int, int]]]
    dropped: dict[str, list[int]]
    reference: nn.Module
    idle_buffers: frozenset[str] = frozenset()
    lost_branches: tuple[str, ...] = ()
    _built: list[nn.Module] = field(default_factory=list)

    @property
    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.weights.items()}

    @cached_property
    def exported(self):
        source = self.program.source
        with traceable(self.reference) if source else nullcontext():
            exported = torch.export.export(self.reference, *self.program.example, strict=False)
        exported.module = lambda: self.reference
        self.program.exported = exported  # its inputs are those of the dense one
        return exported

    @cached_property
    def judge(self):
        return Judge(self)

    @property
    def aliases(self):
        return {}

    @property
    def plan(self):
        return SimpleNamespace(to_json=lambda: '{"schema": 1}')

    @property
    def module(self):
        if not self._built:
            self._built.append(build(self))
        return self._built[0]

    def size_hints(self):
        return self.hints

    def dropped_layers(self):
        return self.dropped


def cut(model, keep, renamed=None):
    """Slice tensors: `keep` maps a name to one list of indices (or None) per dimension."""
    weights = {}
    for name, tensor in named_tensors(model):
        new = name if renamed is None else renamed.get(name)
        if new is None:
            continue
        tensor = tensor.detach()
        for dim, indices in enumerate(keep.get(name, ())):
            if indices is not None:
                tensor = tensor.index_select(dim, torch.tensor(indices))
        weights[new] = tensor.clone()
    return weights


def fake_slim(
    model,
    keep,
    reference,
    example,
    *,
    hints=None,
    dropped=None,
    path: Path | None = None,
):
    """A slim model of `model`, with `reference` in the place of the slim graph."""
    dropped = dropped or {}
    names = [name for name, _ in named_tensors(model)]
    renamed = {name: new for name in names if (new := renumber(name, dropped)) is not None}
    config = getattr(model, "config", None)
    source = config and Source(path=path, config=config, model_class=type(model))
    program = SimpleNamespace(
        module=model,
        source=source,
        weights={name: tensor.detach() for name, tensor in named_tensors(model)},
        parameters={name: tuple(tensor.shape) for name, tensor in named_tensors(model)},
        aliases={},
        example=((), example) if isinstance(example, dict) else (example, {}),
    )
    weights = cut(model, keep, renamed)
    return FakeSlim(program, weights, renamed, hints or {}, dropped, reference.eval())


def renumber(name, dropped):
    """Rename by hand: only one level of stacks, written otherwise than in the library."""
    for stack, gone in dropped.items():
        head, _, rest = name.partition(f"{stack}.")
        if head == "" and rest:
            number, _, tail = rest.partition(".")
            kept = [i for i in range(100) if i not in gone]
            if int(number) not in kept:
                return None
            return f"{stack}.{kept.index(int(number))}.{tail}"
    return name


def zeroed(model, zeros):
    """The masked model: `zeros` maps a parameter to (dimension, indices) that become zero."""
    masked = copy.deepcopy(model)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, (dim, indices) in zeros.items():
            parameters[name].index_fill_(dim, torch.tensor(indices), 0.0)
    return masked


def blocks(kept, size):
    """Indices of the kept blocks of `size`: heads to the rows of a projection."""
    return [i * size + j for i in kept for j in range(size)]
