"""The program: a graph with its axes, structures and weights."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphprune.axes import Atom, Expr
from graphprune.ops import Typing

if TYPE_CHECKING:
    from graphprune.analysis.blocks import Flow
    from graphprune.analysis.cost import CostModel
    from graphprune.workload import Workload


@dataclass(frozen=True, slots=True)
class Block:
    """One removable layer of a stack: where it is cut out of the graph and what it owns.

    Attributes:
        index: position in the stack.
        entry: name of the value that takes the place of `exit`.
        exit: name of the value that the rest of the graph reads.
        nodes: names of all values computed inside.
        parameters: names of the parameters that only this layer uses.
    """

    index: int
    entry: str
    exit: str
    nodes: frozenset[str]
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """A set of tensor slices that can only be removed together, index by index.

    Attributes:
        name: stable name: the first parameter that carries it, its dimension and the place in
            that dimension's expression, "model.layers.0.mlp.up_proj.weight:0"; for a stack of
            layers the path of the stack, "model.layers".
        role: one of `graphprune.analysis.roles.ROLES`, or "" for a frozen structure.
        size: number of units.
        members: the (parameter, dimension) pairs that carry it; dimension 0 for layers.
        prunable: whether units may be removed.
        reason: why not; None for a prunable structure.
        params: parameters that leave with one unit while everything else stays.
        macs: multiply-accumulates that leave with one unit; see `graphprune.workload`.
        scope: prefix of its parameters up to the layer number, "model.layers.0".
        atom: its axis; None for layers.
        within: for a ragged axis, the atom whose every index may keep its own units.
        blocks: for layers and for branches of them, one block per unit.
        minimum: units that the model can't do without, such as k of a top-k; where several
            structures make up an axis, enough for every choice of the others.
        parent: for residual branches, the name of the stack whose layers they are parts of.
    """

    name: str
    role: str
    size: int
    members: tuple[tuple[str, int], ...]
    prunable: bool
    reason: str | None
    params: int
    macs: int
    scope: str = ""
    atom: Atom | None = None
    within: Atom | None = None
    blocks: tuple[Block, ...] = ()
    minimum: int = 1
    parent: str = ""


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
class BaseProgram(ABC):
    """A model as every pass sees it, whatever kind of graph it came from.

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

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, buffer and constant, tied names included."""
        return {n: tuple(d.size for d in dims) for n, dims in self.typing.parameters.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Dimensions of every parameter as an array of numbers."""
        return {n: len(dims) for n, dims in self.typing.parameters.items()}

    @abstractmethod
    def flow(self) -> Flow:
        """What of the graph matters to its layers."""

    @cached_property
    def sublayers(self) -> tuple[Structure, ...]:
        """Attention and MLP branches of the layers, which are pruned only where they are named.

        They are none of `structures`: what they are made of goes with the layers too.
        """
        from graphprune.analysis.sublayers import find_sublayers

        return find_sublayers(self)

    @cached_property
    def by_name(self) -> dict[str, Structure]:
        """Structures and sublayers by their names."""
        return {s.name: s for s in (*self.structures, *self.sublayers)}

    @cached_property
    def workload(self) -> Workload:
        """The input that multiply-accumulates are counted for."""
        from graphprune.workload import workload_of

        return workload_of(self)

    @cached_property
    def costs(self) -> CostModel:
        """Parameters, multiply-accumulates and bytes under any choice of kept units."""
        return self.costs_at(self.workload)

    def costs_at(self, workload: Workload) -> CostModel:
        """The same with the multiply-accumulates of another input."""
        from graphprune.analysis.cost import CostModel
        from graphprune.workload import sizes_at

        return CostModel(self, sizes_at(self, workload))

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
        from graphprune.analysis.structures import frozen_dimensions

        return frozen_dimensions(self.typing)

    def axis(self, parameter: str, dim: int) -> Expr:
        """The axis expression of a parameter's dimension."""
        return self.typing.parameters[parameter][dim]


@dataclass(kw_only=True)
class Program(BaseProgram):
    """A traced model.

    Attributes:
        exported: the graph, with parameters as placeholders; never changed.
        module: the module it was traced from, or None for a file.
        example: (args, kwargs) of the trace.
        source: the Hugging Face checkpoint behind it, if there is one.
    """

    exported: ExportedProgram
    module: torch.nn.Module | None
    example: tuple[tuple[Any, ...], dict[str, Any]]
    source: Source | None = None

    def stored(self) -> Iterable[Stored]:
        """See `BaseProgram.stored`."""
        nodes = {n.name: n for n in self.exported.graph.nodes if n.op == "placeholder"}
        seen = set()
        for spec in self.exported.graph_signature.input_specs:
            if spec.target is None or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                continue
            name = self.aliases.get(spec.target, spec.target)
            value = nodes[spec.arg.name].meta.get("val")
            if name in seen or not isinstance(value, torch.Tensor):
                continue
            seen.add(name)
            is_parameter = spec.kind == InputKind.PARAMETER
            in_file = is_parameter or bool(spec.persistent)
            yield Stored(name, is_parameter, 8 * value.element_size() if in_file else 0)

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `BaseProgram.inputs`."""
        specs = self.exported.graph_signature.input_specs
        return tuple(s.arg.name for s in specs if s.target is None)

    def code(self) -> str:
        """See `BaseProgram.code`."""
        nodes = self.exported.graph.nodes
        return "\n".join(f"{n.name} {n.op} {n.target} {n.args} {n.kwargs}" for n in nodes)

    def stacks(self) -> dict[str, tuple[int, list[Block]]]:
        """See `BaseProgram.stacks`."""
        from graphprune.analysis.layers import find_layers

        return find_layers(self.exported, self.typing, self.aliases)

    def flow(self) -> Flow:
        """See `BaseProgram.flow`."""
        from graphprune.analysis.layers import flow_of

        return flow_of(self.exported, self.typing, self.aliases)

    def operator_of(self, value: str) -> tuple[str, str] | None:
        """See `BaseProgram.operator_of`."""
        from graphprune.analysis.layers import module_path

        node = self._nodes.get(value)
        if node is None or node.op != "call_function":
            return None
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return None
        return str(schema.name).replace("::", "."), module_path(node)

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.exported.graph.nodes}

    def fixed_layers(self) -> dict[str, str]:
        """See `BaseProgram.fixed_layers`."""
        from graphprune.analysis.blocks import fixed_blocks

        return fixed_blocks(self.flow())

    def residual_sums(self) -> list[str]:
        """See `BaseProgram.residual_sums`."""
        from graphprune.analysis.layers import sums_of

        return sums_of(self.exported.graph, self.typing)
