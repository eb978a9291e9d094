"""A random graph as data: a list of instructions, and the module that interprets it.

A recipe prints as Python, so that a failing one can be pasted into a regression test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from properties import families, places, spellings  # noqa: F401  (they fill the table)
from properties.operators import OPERATORS

# Name, the values it reads, constants. Value i is input i, then come the results in order.
Instruction = tuple[Any, ...]


@dataclass(frozen=True)
class Recipe:
    """A random graph.

    Attributes:
        inputs: shapes of floating inputs; ``("ids", rows, *shape)`` for places in a table of rows.
        steps: ``(name, (operands...), *constants)``.
        outputs: the values returned.
        dynamic: whether the first dimension of every input is traced as a dynamic one.
        scale: of the floating inputs.
    """

    inputs: tuple[tuple[Any, ...], ...]
    steps: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    dynamic: bool = False
    scale: float = 1.0

    def example(
        self, batch: int | None = None, seed: int = 0, scale: float | None = None
    ) -> tuple[Tensor, ...]:
        """Random inputs, of another batch or another scale where that is given."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (_input(given, batch, generator) for given in self.inputs)
        scale = self.scale if scale is None else scale
        return tuple(x * scale if x.is_floating_point() else x for x in drawn)

    def build(self, seed: int = 0) -> nn.Module:
        """The module, with random parameters and statistics, in evaluation mode."""
        net = Net(self.steps, self.outputs)
        with torch.no_grad():
            net(*self.example())
        randomise(net, seed)
        return net.eval()


def _input(given: tuple[Any, ...], batch: int | None, generator: torch.Generator) -> Tensor:
    ids = given[0] == "ids"
    shape = given[2:] if ids else given
    shape = (batch or shape[0], *shape[1:])
    if ids:
        return torch.randint(0, given[1], shape, generator=generator)
    return torch.randn(shape, generator=generator)


class Net(nn.Module):
    """Interprets instructions; parameters are made when an instruction runs for the first time."""

    def __init__(self, steps: tuple[Instruction, ...], outputs: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.steps = steps
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> Any:
        values: list[Any] = list(inputs)
        for i, step in enumerate(self.steps):
            values.append(self.compute(i, step, values))
        if not self.outputs:
            return values[-1]
        return tuple(values[o] for o in self.outputs)

    def compute(self, index: int, step: Instruction, values: list[Any]) -> Any:
        """One instruction on the values so far."""
        name, operands, *constants = step
        here = _Step(self, index, values[0].shape[0] if values else 0)
        return OPERATORS[name](here, *(values[i] for i in operands), *constants)


class _Step:
    """See `properties.operators.Step`; the module of instruction 3 is `m3`."""

    def __init__(self, net: Net, index: int, batch: Any) -> None:
        self.net, self.index, self.batch = net, index, batch

    def _own(self, kind: str, make: Callable[[str], None]) -> Any:
        name = f"{kind}{self.index}"
        if not hasattr(self.net, name):
            make(name)
        return getattr(self.net, name)

    def module(self, make: Callable[[], nn.Module]) -> Any:
        return self._own("m", lambda name: self.net.add_module(name, make().eval()))

    def parameter(self, *shape: int) -> Any:
        def make(name: str) -> None:
            self.net.register_parameter(name, nn.Parameter(torch.empty(shape)))

        return self._own("w", make)

    def buffer(self, make: Callable[[], Tensor]) -> Any:
        return self._own("b", lambda name: self.net.register_buffer(name, make()))

    def of(self, index: int) -> Any:
        return getattr(self.net, f"m{index}")

    def tie(self, index: int) -> Any:
        weight = getattr(self.net, f"m{index}").weight
        return self._own("w", lambda name: self.net.register_parameter(name, weight))

    def layers(self, blocks: Any) -> Any:
        return self.module(lambda: nn.ModuleList([Net(steps) for steps in blocks]))


def randomise(net: nn.Module, seed: int) -> None:
    """Parameters and statistics away from their initial values, scales and variances positive."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
            values = values / fan_in**0.5
            if name.endswith("var"):
                values = values.abs() + 0.5
            elif tensor.dim() == 1 and name.endswith("weight"):
                values = values + 1
            tensor.copy_(values)
