"""A traced program with other weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from graphprune.ir.torch.program import Program
from graphprune.streaming.core.weights import Lazily, fitting


def apply_weights(program: Program, new: Mapping[str, Tensor]) -> Program:
    """A program with some weights exchanged, in its module too; see `fitting` for errors."""
    held = fitting(program, new)
    module = None if program.module is None else _with_tensors(program, program.module, held)
    names = tuple(program.weights)
    aliases = program.aliases

    def read(name: str) -> Tensor:
        found = held.get(aliases.get(name, name))
        return program.weights[name] if found is None else found

    return replace(program, weights=Lazily(names, read), module=module)


def _with_tensors(
    program: Program, module: torch.nn.Module, new: Mapping[str, Tensor]
) -> torch.nn.Module:
    """A copy of a module that shares all tensors but the new ones."""
    kept = [*module.parameters(), *module.buffers()]
    result = copy.deepcopy(module, {id(t): t for t in kept})
    for name, tensor in new.items():
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        for alias in (name, *(a for a, c in program.aliases.items() if c == name)):
            path, _, leaf = alias.rpartition(".")
            owner = result.get_submodule(path)
            if leaf in owner._parameters:
                old = owner._parameters[leaf]
                parameter.requires_grad_(old is not None and old.requires_grad)
                owner._parameters[leaf] = parameter
    return result
