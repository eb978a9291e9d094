"""Applying a plan: the slim model as a program, a module and files."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

from graphprune.analysis.cost import Cost
from graphprune.axes import count, counter
from graphprune.errors import EmitError
from graphprune.exclusive import one_at_a_time
from graphprune.ir.torch.constants import known_values
from graphprune.ir.torch.flow import module_path
from graphprune.ir.torch.liveness import live_nodes
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Plan, Selection
from graphprune.rewrite.graph import (
    check_shapes,
    graph_constants,
    propagate_metadata,
    rewrite_graph,
)
from graphprune.rewrite.renumber import shifted, shifts_of
from graphprune.rewrite.weights import SlicedWeights

if TYPE_CHECKING:
    from graphprune.analysis.workload import Workload
    from graphprune.rewrite.module.judge import Judge

Format = Literal["hf", "pt2", "onnx", "onnx-decoder"]
_WRITERS = {"onnx-decoder": "decoder"}
"""Modules of `graphprune.emit` that don't have the name of their format."""


def apply(
    program: Program, plan: Plan, *, consume: bool = False, folder: Path | None = None
) -> Slim:
    """Rewrite a program for a plan.

    Args:
        program: the dense program.
        plan: what to keep.
        consume: take the dense weights apart while cutting, so that no second copy of the model
            is needed; the dense program and module can't be used afterwards.
        folder: where weights are that are too many for memory, in files without a name; None for
            the temporary folder.

    Returns:
        The slim model. Its graph's shapes have been re-checked on meta tensors.

    Raises:
        PlanError: the plan was made for another model.
        EmitError: the file system has no room for the weights.
    """
    slim = Slim(program, plan, plan.bind(program))
    slim.weights.materialize(release=consume, folder=folder)
    slim.graph  # noqa: B018  (shapes are checked now, not at first use)
    return slim


class Slim:
    """A slim model.

    Attributes:
        program: the dense program it came from.
        plan: the plan that was applied.
        selection: the plan's masks and cuts.
        renamed: dense parameter name to slim name; removed parameters are absent.
        weights: slim parameter, buffer and constant name to tensor.
    """

    def __init__(self, program: Program, plan: Plan, selection: Selection) -> None:
        """A slim model whose tensors are cut on demand; use `apply`."""
        self.program = program
        self.plan = plan
        self.selection = selection
        self.renamed = _renamed(program, selection)
        self.weights = SlicedWeights(program, selection, self.renamed)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Slim name to shape, for every parameter, buffer and constant, tied names included."""
        count = counter(self.selection.keep)
        dims = self.program.typing.parameters
        return {new: tuple(map(count, dims[old])) for old, new in self.renamed.items()}

    @cached_property
    def idle_buffers(self) -> frozenset[str]:
        """Slim names of the buffers that no value depends on and that no checkpoint stores."""
        live = {node.name for node in live_nodes(self.program.exported.graph)}
        return frozenset(
            self.renamed[s.target]
            for s in self._specs
            if s.target is not None and s.persistent is False and s.arg.name not in live
        )

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Tied slim name to the slim name that stands for it."""
        return {
            self.renamed[a]: self.renamed[c]
            for a, c in self.program.aliases.items()
            if a in self.renamed and c in self.renamed
        }

    @property
    def cost(self) -> Cost:
        """Parameters, multiply-accumulates and bytes."""
        return self.cost_at(self.program.workload)

    def cost_at(self, workload: Workload) -> Cost:
        """The cost for another input than the usual one."""
        program = self.program
        costs = program.costs if workload == program.workload else program.costs_at(workload)
        blocks = [b for cut in self.selection.cuts.values() for b in cut]
        return costs.of(self.selection.keep, blocks)

    @cached_property
    def graph(self) -> fx.Graph:
        """The slim graph with parameters as placeholders, its shapes checked."""
        graph = rewrite_graph(self.program, self.selection)
        _renumber_modules(graph, shifts_of(self.program, self.selection))
        shapes, known = self._placeholder_shapes(graph), self._known_values(graph)
        check_shapes(graph, self.program, self.selection, shapes, known)
        return graph

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The slim graph as a module; its values' metadata is that of the slim model."""
        module = fx.GraphModule(self.program.exported.graph_module, self.graph)
        propagate_metadata(module, self.program, self._placeholder_shapes(self.graph))
        return module

    def _placeholder_shapes(self, graph: fx.Graph) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(t.shape) for name, t in graph_constants(graph).items()}
        for spec in self._specs:
            if spec.target is not None and isinstance(spec.arg, TensorArgument):
                shapes[spec.arg.name] = self.shapes[self.renamed[spec.target]]
        return shapes

    def _known_values(self, graph: fx.Graph) -> dict[str, Any]:
        """What follows from the slim model's constants, where the graph asks for values."""
        own = graph_constants(graph)
        stored = {s.arg.name: self.renamed[s.target] for s in self._specs if s.target is not None}
        return known_values(
            graph,
            {**stored, **{n: n for n in own}},
            lambda name: own[name] if name in own else self.weights[name],
        )

    @property
    def _specs(self) -> list[InputSpec]:
        """Input specs of the dense program whose parameters stay."""
        return [
            s
            for s in self.program.exported.graph_signature.input_specs
            if s.target is None or s.target in self.renamed
        ]

    def _output_specs(self) -> list[OutputSpec]:
        """The dense program's output specs, named after what the slim graph returns."""
        specs = list(self.program.exported.graph_signature.output_specs)
        returned: Any = self.graph.output_node().args[0]
        for i, (spec, value) in enumerate(zip(specs, returned, strict=True)):
            if isinstance(spec.arg, TensorArgument) and spec.arg.name != value.name:
                arg = TensorArgument(name=value.name)
                specs[i] = OutputSpec(kind=spec.kind, arg=arg, target=spec.target)
        return specs

    @cached_property
    def exported(self) -> ExportedProgram:
        """The slim model as a valid exported program."""
        dense = self.program.exported
        specs = [
            s if s.target is None else _retarget(s, self.renamed[s.target]) for s in self._specs
        ]
        state: dict[str, torch.Tensor | torch.nn.Parameter] = {}
        constants = dict(dense.constants)
        for s in specs:
            if s.target is None:
                continue
            tensor = self.weights[s.target]
            if s.kind == InputKind.PARAMETER:
                state[s.target] = torch.nn.Parameter(tensor, requires_grad=False)
            elif s.kind == InputKind.BUFFER and s.persistent:
                state[s.target] = tensor
            else:
                constants[s.target] = tensor
        gone = {s.target for s in dense.graph_signature.input_specs} - {s.target for s in specs}
        constants = {n: c for n, c in constants.items() if n not in gone}
        first_input = next((i for i, s in enumerate(specs) if s.target is None), len(specs))
        for name, tensor in graph_constants(self.graph).items():
            constants[name] = tensor
            arg = TensorArgument(name=name)
            specs.insert(first_input, InputSpec(InputKind.CONSTANT_TENSOR, arg, name))
            first_input += 1
        exported = ExportedProgram(
            root=self.graph_module,
            graph=self.graph_module.graph,
            graph_signature=ExportGraphSignature(specs, self._output_specs()),
            state_dict=state,
            range_constraints=dense.range_constraints,
            module_call_graph=dense.module_call_graph,
            example_inputs=dense.example_inputs,
            constants=constants,
            verifiers=dense.verifiers,
        )
        exported.validate()  # type: ignore[no-untyped-call]
        return exported

    @cached_property
    def module(self) -> torch.nn.Module:
        """The slim model as a module with the signature of the source; see `form`."""
        from graphprune.rewrite.module.module import build

        return build(self)

    @property
    def form(self) -> Literal["class", "graph"]:
        """What `module` is: one of the source's class, or the exported graph as a module.

        The latter where the source is a file, and where no sizes of the class compute what the
        graph computes, such as where its code takes a factor from a size that has changed.
        """
        return "class" if type(self.module) is type(self.program.module) else "graph"

    @cached_property
    def judge(self) -> Judge:
        """What other forms of the slim model are compared with."""
        from graphprune.rewrite.module.judge import Judge

        return Judge(self)

    def size_hints(self) -> dict[str, list[tuple[int, int]]]:
        """Changed sizes of the values that each module computes: path to (old, new) pairs.

        For every changed axis the pairs of its whole and of its parts are listed, so that an
        attention module shows its heads as well as its width.
        """
        hints: dict[str, dict[tuple[int, int], None]] = {}
        for node in self.program.exported.graph.nodes:
            path = module_path(node)
            values = [n for n in (node, *node.all_input_nodes)]
            for value in values:
                for dims in self.program.typing.values.get(value.name, ()):
                    for d in dims:
                        for pair in _changes(d, self.selection.keep):
                            hints.setdefault(path, {})[pair] = None
        return {path: list(pairs) for path, pairs in hints.items()}

    def dropped_layers(self) -> dict[str, list[int]]:
        """Stack path to the indices of its removed layers."""
        cuts = self.selection.cuts.items()
        by_name = self.program.by_name
        return {s: [b.index for b in blocks] for s, blocks in cuts if not by_name[s].parent}

    @property
    def lost_branches(self) -> list[str]:
        """Names of the structures of branches that have left layers which stay."""
        return [s for s in self.selection.cuts if self.program.by_name[s].parent]

    @one_at_a_time
    def save(self, path: str | Path, format: Format = "hf") -> None:
        """Write the slim model.

        Args:
            path: a directory for "hf", a file for the others.
            format: which form.

        Raises:
            EmitError: the form can't hold this model, or writing failed. Nothing is left behind.
        """
        if format not in get_args(Format):
            raise EmitError(
                f"unknown format {format!r}", hint='use "hf", "pt2", "onnx" or "onnx-decoder"'
            )
        writer = _WRITERS.get(format, format)
        importlib.import_module(f"graphprune.emit.{writer}").save(self, Path(path))


def _renamed(program: Program, selection: Selection) -> dict[str, str]:
    """Dense to slim names."""
    shifts = shifts_of(program, selection)
    gone = selection.removed_parameters
    names = program.typing.parameters
    return {n: shifted(n, shifts) for n in names if program.aliases.get(n, n) not in gone}


def _renumber_modules(graph: fx.Graph, shifts: Mapping[str, Mapping[int, int]]) -> None:
    """Give values the new paths of the modules that compute them."""
    for node in graph.nodes if shifts else ():
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (shifted(str(entry[0]), shifts), *entry[1:]) for key, entry in stack.items()
            }


def _changes(e: Any, keep: Mapping[Any, Any]) -> list[tuple[int, int]]:
    from graphprune.axes import Atom, Product, Sum, normal, touched

    e = normal(e)
    if not touched(e, keep):
        return []
    found = [(e.size, count(e, keep))]
    match e:
        case Product(factors=parts):
            for n in range(1, len(parts)):  # heads = kv heads * queries of each
                head = Product(parts[:n])
                found.extend(_changes(head, keep) if n > 1 else [])
        case Sum(terms=parts):
            pass
        case _:
            parts = ()
    for part in parts:
        if not isinstance(e, Atom):
            found.extend(_changes(part, keep))
    return [pair for pair in dict.fromkeys(found) if pair[0] != pair[1]]


def _retarget(spec: InputSpec, target: str) -> InputSpec:
    return InputSpec(kind=spec.kind, arg=spec.arg, target=target, persistent=spec.persistent)
