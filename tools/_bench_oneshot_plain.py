"""SparseGPT and Wanda as their papers describe them, for tools/bench oneshot to compare with.

One decoder block at a time: its inputs are kept for all samples, hooks on its linear layers sum a
Hessian (or norms) for each of them in a first forward pass, the layers are pruned, and a second
forward pass gives the inputs of the next block. SparseGPT (arXiv:2301.00774): the Cholesky factor
of the inverse Hessian, masks in blocks of 128 columns, updates within the block column by column
and of the columns behind it afterwards. Wanda (arXiv:2306.11695): |weight| times the norm of the
input, lowest of every row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 128
DAMPING = 0.01


class _SparseGPT:
    """Hessian and pruning of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.hessian = torch.zeros(layer.in_features, layer.in_features)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Count a sample [1, tokens, in] in a running mean."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.hessian *= self.samples / (self.samples + 1)
        self.samples += 1
        rows = rows * (2 / self.samples) ** 0.5
        self.hessian += rows.T @ rows

    def prune(self, sparsity: float) -> None:
        """Prune the layer in place."""
        weight = self.layer.weight.data.clone().float()
        hessian = self.hessian
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        inverse = torch.linalg.cholesky(inverse, upper=True)
        columns = weight.shape[1]
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            block = weight[:, start:end].clone()
            pruned, errors = torch.zeros_like(block), torch.zeros_like(block)
            local = inverse[start:end, start:end]
            scores = block**2 / local.diagonal().reshape(1, -1) ** 2
            level = scores.flatten().sort().values[int(scores.numel() * sparsity)]
            gone = scores <= level
            for i in range(end - start):
                column = block[:, i]
                new = column.clone()
                new[gone[:, i]] = 0
                pruned[:, i] = new
                error = (column - new) / local[i, i]
                block[:, i:] -= error.unsqueeze(1) @ local[i, i:].unsqueeze(0)
                errors[:, i] = error
            weight[:, start:end] = pruned
            weight[:, end:] -= errors @ inverse[start:end, end:]
        self.layer.weight.data = weight.to(self.layer.weight.dtype)


class _Wanda:
    """Norms and pruning of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.squares = torch.zeros(layer.in_features)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Count a sample [1, tokens, in] in a running mean."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.squares *= self.samples / (self.samples + 1)
        self.samples += 1
        self.squares += torch.norm(rows, p=2, dim=0) ** 2 / self.samples

    def prune(self, sparsity: float) -> None:
        """Prune the layer in place."""
        weight = self.layer.weight.data
        scores = weight.abs() * self.squares.sqrt().reshape(1, -1)
        order = scores.sort(dim=1, stable=True).indices
        weight.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], 0)


class _Reached(Exception):
    """Ends a forward pass at the first block."""


@torch.no_grad()
def prune(model: Any, windows: Tensor, method: str, sparsity: float) -> None:
    """Prune the linear layers of a decoder's blocks in place.

    Args:
        model: a causal language model with its blocks in ``model.model.layers``.
        windows: int64 [samples, length].
        method: "sparsegpt" or "wanda".
        sparsity: of every layer.
    """
    blocks = model.model.layers
    inputs, arguments = _first_inputs(model, blocks[0], windows)
    outputs = torch.zeros_like(inputs)
    for block in blocks:
        layers = [m for m in block.modules() if isinstance(m, nn.Linear)]
        solvers = [(_SparseGPT if method == "sparsegpt" else _Wanda)(layer) for layer in layers]
        hooks = [
            layer.register_forward_hook(_adding(solver))
            for layer, solver in zip(layers, solvers, strict=True)
        ]
        for i in range(len(inputs)):
            outputs[i] = _hidden(block(inputs[i : i + 1], **arguments))
        for hook in hooks:
            hook.remove()
        for solver in solvers:
            solver.prune(sparsity)
        for i in range(len(inputs)):
            outputs[i] = _hidden(block(inputs[i : i + 1], **arguments))
        inputs, outputs = outputs, inputs


def _adding(solver: _SparseGPT | _Wanda) -> Callable[..., None]:
    return lambda module, args, output: solver.add(args[0])


def _first_inputs(model: Any, block: nn.Module, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first block is given: hidden states of all samples, and the other arguments."""
    found: list[Tensor] = []
    others: dict[str, Any] = {}

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs.pop("hidden_states"))
        others.update(kwargs)
        raise _Reached

    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows.split(1):
        with suppress(_Reached):
            model.model(input_ids=window, use_cache=False)
    hook.remove()
    return torch.cat(found), others


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
