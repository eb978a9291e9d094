"""An independent streamed run: modules with forward hooks, in float64, a whole model at a time.

For every group it runs the module from the start with the weights treated so far, and takes what a
hook sees. That is slow, and has nothing in common with an interpreter of a graph.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graphprune.frontends.hf.load import trace_model
from zoo.case import randomise


def tokens(count=3, length=7, seed=5):
    """Token windows for the models of the zoo."""
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(seed))


def traced(build):
    """A program, which tests share, and its module in float64, which is the caller's own."""
    program, module = _traced(build)
    return program, copy.deepcopy(module)


@functools.cache
def _traced(build):
    torch.manual_seed(0)
    module = randomise(build()).eval()
    program = trace_model(module)
    wide = copy.deepcopy(module).double()
    assert all(p.dtype == torch.float64 for p in wide.parameters())
    return program, wide


@dataclass
class Moments:
    """Sum of outer products and the number of rows, in float64."""

    total: Tensor | float = 0.0
    rows: int = 0
    calls: int = 0

    def add(self, x):
        assert x.dim() == 2
        x = x.double()
        self.total = self.total + x.T @ x
        self.rows += len(x)
        self.calls += 1


def halved(matrices: Tensor, moments: list[Moments]) -> Tensor:
    """A treatment whose result depends on the weight, the statistic and the orientation.

    The half of every row with the smallest |w| * norm(x) becomes zero.
    """
    result = matrices.clone()
    for part, seen in enumerate(moments):
        norms = seen.total.diagonal().sqrt() if seen.rows else torch.ones(matrices.shape[-1])
        score = result[part].double().abs() * norms
        order = score.argsort(dim=1, stable=True)
        result[part].scatter_(1, order[:, : matrices.shape[-1] // 2], 0.0)
    return result


@dataclass
class Halving:
    """`halved` as a treatment, with a record of everything it was asked."""

    groups: list = field(default_factory=list)
    moments: dict = field(default_factory=dict)
    made: int = 0

    def observer(self, group, part):
        self.made += 1
        return Moments()

    def treat(self, group, observers, weights):
        self.groups.append(group)
        for name in group.parameters:
            self.moments[name] = list(observers)
            layout = group.layout(name)
            weight = weights[name]
            new = halved(layout.matrices(weight), observers)
            yield name, layout.restored(new, weight.shape)


class Wide(TorchFunctionMode):
    """float64 wherever a module asks for float32 by name, as in its norms and softmaxes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def inputs_of(module, wanted, samples):
    """What the modules named in `wanted` are called with, one list of tensors per name."""
    seen = {name: [] for name in wanted}
    handles = []
    for name in wanted:
        own = seen[name]

        def hook(_, args, own=own):
            own.append(args[0].detach().clone())

        handles.append(module.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad(), Wide():
        for args, kwargs in samples:
            module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen
