"""What analyses read of a model, whatever kind of graph it came from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from graphprune.analysis.structure import Block, Structure
from graphprune.ops import Typing

if TYPE_CHECKING:
    from graphprune.analysis.blocks import Flow


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that a model stores.

    Attributes:
        name: its name; tied ones are listed once.
        is_parameter: whether it counts as parameters.
        element_bits: bits that each element takes in a file; 0 for what no file holds.
        values: numbers that each element holds; more than one where they share a byte.
    """

    name: str
    is_parameter: bool
    element_bits: int
    values: int = 1


@dataclass(kw_only=True)
class GraphFacts(ABC):
    """The axes of a model, what it stores, and how its layers lie in the graph.

    Attributes:
        weights: parameter, buffer and constant name to tensor; may be lazy.
        aliases: tied parameter name to the name that stands for it.
        typing: the axes of all values and parameters.
        structures: what can be pruned, and what can't and why.
        trainable: names of the parameters, of which structures are made.
    """

    weights: Mapping[str, torch.Tensor]
    aliases: dict[str, str]
    typing: Typing
    structures: tuple[Structure, ...] = ()
    trainable: frozenset[str] = field(default_factory=frozenset)

    @abstractmethod
    def stored(self) -> Iterable[Stored]:
        """The tensors that the model's size is made of."""

    @abstractmethod
    def stacks(self) -> dict[str, tuple[int, list[Block]]]:
        """Path of every stack of layers to its length and the layers that can be removed."""

    def fixed_layers(self) -> dict[str, str]:
        """Path of every layer of a stack that can't be removed, to the reason."""
        return {}

    def gone_with(self, blocks: Collection[Block]) -> frozenset[str]:
        """The values and parameters that leave with some layers."""
        return frozenset(name for b in blocks for name in (*b.nodes, *b.parameters))

    @abstractmethod
    def residual_sums(self) -> list[str]:
        """Names of the values ``x + f(x)``."""

    @abstractmethod
    def flow(self) -> Flow:
        """What of the graph matters to its layers."""

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, buffer and constant, tied names included."""
        return {n: tuple(d.size for d in dims) for n, dims in self.typing.parameters.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Dimensions of every parameter as an array of numbers."""
        return {n: len(dims) for n, dims in self.typing.parameters.items()}
