"""Traced torch models as programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeGuard

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphprune.analysis.blocks import Flow, fixed_blocks
from graphprune.analysis.facts import Stored
from graphprune.analysis.program import BaseProgram, Example, GraphFormat
from graphprune.analysis.signature import Input
from graphprune.analysis.structure import Block
from graphprune.analysis.workload import LENGTH, Workload, resized
from graphprune.axes import Atom
from graphprune.checkpoints.config import WINDOWS
from graphprune.ir.torch.flow import find_layers, flow_of, module_path, sums_of
from graphprune.ir.torch.signature import inputs_of_graph
from graphprune.ir.torch.workload import OpenSizes, value_shapes


@dataclass(kw_only=True)
class Program(BaseProgram):
    """A traced model.

    Attributes:
        exported: the graph, with parameters as placeholders; never changed.
        module: the module it was traced from, or None for a file.
        example: (args, kwargs) of the trace.
        source: the Hugging Face checkpoint behind it, if there is one.
    """

    format: ClassVar[GraphFormat] = "torch"

    exported: ExportedProgram
    module: torch.nn.Module | None = field()
    example: Example = field()

    def as_module(self) -> torch.nn.Module:
        """See `BaseProgram.as_module`."""
        return self.module if self.module is not None else self.exported.module()

    def as_inputs(self, data: Any) -> Any:
        """See `BaseProgram.as_inputs`: one input needs no name, and may not have one."""
        only = isinstance(data, Mapping) and len(data) == 1 == len(self.signature())
        return next(iter(data.values())) if only else data

    def stored(self) -> Iterable[Stored]:
        """The tensors that the model's size is made of."""
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
        """Names of the values that the model is given, in order."""
        specs = self.exported.graph_signature.input_specs
        return tuple(s.arg.name for s in specs if s.target is None)

    def code(self) -> str:
        """The graph in words: equal for two programs that compute the same with equal weights."""
        nodes = self.exported.graph.nodes
        return "\n".join(f"{n.name} {n.op} {n.target} {n.args} {n.kwargs}" for n in nodes)

    def stacks(self) -> dict[str, tuple[int, list[Block]]]:
        """Path of every stack of layers to its length and the layers that can be removed."""
        return find_layers(self.exported, self.typing, self.aliases)

    def flow(self) -> Flow:
        """What of the graph matters to its layers."""
        return self._flow

    @cached_property
    def _flow(self) -> Flow:
        return flow_of(self.exported, self.typing, self.aliases)

    def operator_of(self, value: str) -> tuple[str, str] | None:
        """Name of the operator that computes a value, and its module, as far as it is known."""
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
        """Path of every layer of a stack that can't be removed, to the reason."""
        return fixed_blocks(self.flow())

    def residual_sums(self) -> list[str]:
        """Names of the values ``x + f(x)``."""
        return sums_of(self.exported.graph, self.typing)

    @property
    def is_causal(self) -> bool:
        """Whether the model reads token ids and nothing else, as causal language models do."""
        args, kwargs = self.example
        return not args and set(kwargs) == {"input_ids"}

    def declared_windows(self) -> list[int]:
        """How many tokens a configuration says that the model takes."""
        if self.source is None or self.source.config is None:
            return []
        text = self.source.config.get_text_config()
        known = (getattr(text, name, None) for name in WINDOWS)
        return [v for v in known if isinstance(v, int) and v > 0]

    def signature(self) -> list[Input]:
        """The inputs, in order; only what is no tensor is missing."""
        return inputs_of_graph(self.exported)

    def workload_of(self, length: int) -> Workload:
        """One sample as an input to count multiply-accumulates for."""
        return self._calls(length).workload()

    def traced_workload(self) -> Workload:
        """The input that a program was traced with, or the first example of an ONNX file."""
        return self._calls(LENGTH).traced()

    def sizes_at(self, workload: Workload) -> dict[Atom, int]:
        """Sizes of the axes that have others in a call than in the program's example."""
        return dict(resized(self.typing.values, value_shapes(self.exported, workload)))

    def _calls(self, length: int) -> OpenSizes:
        """What the trace leaves open."""
        # Elsewhere the example is the user's own, and its length means something.
        ours = self.source is not None or self.is_causal
        longest = min(length, self.default_window()) if ours else None
        return OpenSizes(self.exported, self.signature(), longest)


def is_traced(program: BaseProgram) -> TypeGuard[Program]:
    """Whether a program is a traced one: it runs node by node, and gradients can be taken of it."""
    return isinstance(program, Program)
