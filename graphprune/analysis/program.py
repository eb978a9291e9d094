"""The program: a graph with its axes, structures and weights."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch

from graphprune.analysis.cost import CostModel
from graphprune.analysis.facts import GraphFacts
from graphprune.analysis.signature import Input, token_input
from graphprune.analysis.structure import Structure
from graphprune.analysis.structures import frozen_dimensions
from graphprune.analysis.sublayers import find_sublayers
from graphprune.analysis.workload import LENGTH, Workload
from graphprune.axes import Atom, Expr
from graphprune.checkpoints.config import WINDOW
from graphprune.errors import LoadError

GraphFormat = Literal["torch", "onnx"]
Example: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """Where a Hugging Face program came from.

    Attributes:
        path: its directory, or None for a module in memory.
        config: its configuration object.
        model_class: the transformers class that was built.
        trust: whether code in the directory may be run.
        unused: names in its files that the model has no place for.
    """

    path: Path | None
    config: Any
    model_class: type[torch.nn.Module]
    trust: bool = False
    unused: tuple[str, ...] = ()


@dataclass(kw_only=True)
class BaseProgram(GraphFacts):
    """A model as every pass sees it, whatever kind of graph it came from. See `GraphFacts`.

    Attributes:
        format: what kind of graph it is, by which adapters are chosen.
        module: the module it was traced from, if there is one.
        example: (args, kwargs) of the trace, if it was traced.
        source: the Hugging Face checkpoint behind it, if there is one.
    """

    format: ClassVar[GraphFormat]

    module: torch.nn.Module | None = None
    example: Example | None = None
    source: Source | None = None

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that the model is given, in order."""

    @abstractmethod
    def code(self) -> str:
        """The graph in words: equal for two programs that compute the same with equal weights."""

    @abstractmethod
    def operator_of(self, value: str) -> tuple[str, str] | None:
        """Name of the operator that computes a value, and its module, as far as it is known."""

    @abstractmethod
    def signature(self) -> list[Input]:
        """The inputs, in order; only what is no tensor is missing."""

    @abstractmethod
    def as_inputs(self, data: Any) -> Any:
        """Samples in the form that the graph takes: tensors, or arrays for an ONNX file.

        Args:
            data: tensors, or a mapping of input name to them.
        """

    def as_module(self) -> torch.nn.Module:
        """The model as a module: the one that was traced, or its graph.

        Raises:
            LoadError: it is no PyTorch model.
        """
        raise LoadError("an ONNX model is no PyTorch module")

    @property
    def origin(self) -> Path | None:
        """The checkpoint or file that it was read from; None for one in memory."""
        return None if self.source is None else self.source.path

    @property
    def files(self) -> frozenset[Path]:
        """The files and directories that weights are read from when they are needed."""
        return frozenset(() if self.origin is None else (Path(self.origin),))

    @property
    def is_causal(self) -> bool:
        """Whether the model reads token ids and nothing else, as causal language models do."""
        return False

    def default_window(self) -> int:
        """Tokens in a window: 2048, or as many as the model can take if that is less.

        That is what its configuration or its trace says, or the places that it has positions for.
        """
        limits = [WINDOW, *self.declared_windows()]
        found = self.signature()
        tokens = token_input(found)
        if tokens is not None:
            limits += [n for n in (tokens.shape[1], tokens.longest) if n is not None]
        limits += [i.bound for i in found if i.name == "position_ids" and i.bound is not None]
        return min(limits)

    def declared_windows(self) -> list[int]:
        """How many tokens a configuration says that the model takes."""
        return []

    @abstractmethod
    def workload_of(self, length: int) -> Workload:
        """One sample as an input to count multiply-accumulates for.

        Args:
            length: tokens, and other open sizes of an ONNX file. A model that can't take so many
                gets what it can.
        """

    @abstractmethod
    def traced_workload(self) -> Workload:
        """The input that a program was traced with, or the first example of an ONNX file."""

    @abstractmethod
    def sizes_at(self, workload: Workload) -> dict[Atom, int]:
        """Sizes of the axes that have others in a call than in the program's example."""

    @cached_property
    def sublayers(self) -> tuple[Structure, ...]:
        """Attention and MLP branches of the layers, which are pruned only where they are named.

        They are none of `structures`: what they are made of goes with the layers too.
        """
        return find_sublayers(self, self.costs)

    @cached_property
    def by_name(self) -> dict[str, Structure]:
        """Structures and sublayers by their names."""
        return {s.name: s for s in (*self.structures, *self.sublayers)}

    @cached_property
    def workload(self) -> Workload:
        """The input that multiply-accumulates are counted for."""
        return self.workload_of(LENGTH)

    @cached_property
    def costs(self) -> CostModel:
        """Parameters, multiply-accumulates and bytes under any choice of kept units."""
        return self.costs_at(self.workload)

    def costs_at(self, workload: Workload) -> CostModel:
        """The same with the multiply-accumulates of another input."""
        return CostModel(self, self.sizes_at(workload))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of parameter shapes and structures: equal for fine-tuned siblings."""
        facts = {
            "parameters": {n: self.parameters[n] for n in sorted(self.parameters)},
            "structures": sorted((s.name, s.size, s.prunable) for s in self.structures),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def frozen(self) -> dict[tuple[str, int], str]:
        """Why each parameter dimension that can't be pruned at all is frozen."""
        return frozen_dimensions(self.typing)

    def axis(self, parameter: str, dim: int) -> Expr:
        """The axis expression of a parameter's dimension."""
        return self.typing.parameters[parameter][dim]
