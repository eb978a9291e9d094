"""Runs an exported program with all floating numbers in one dtype."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from graphprune.errors import VerifyError
from graphprune.exclusive import default_dtype
from graphprune.ir.torch.floats import makes_floats, settled
from graphprune.ir.torch.randomness import draws, seeded
from graphprune.placement.graphs import default_device, moved_graphs, to_processor

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def run_graph(
    exported: ExportedProgram,
    weights: Mapping[str, Tensor],
    inputs: Inputs,
    dtype: torch.dtype = torch.float64,
    *,
    aliases: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run an exported program with all floating numbers in one dtype.

    Args:
        exported: a program without in-place operators.
        weights: tensors by the names of its signature; read one at a time.
        inputs: (args, kwargs).
        dtype: float64 or float32, whatever the graph and the tensors say.
        aliases: tied name to the name under which `weights` has it.

    Returns:
        The flat user outputs, in order.
    """
    return GraphRunner(exported, weights, dtype, aliases or {}).outputs(inputs)


def output_names(exported: ExportedProgram) -> list[str]:
    """Names of the user outputs of `exported`, in the order of `run_graph`'s result."""
    specs = exported.graph_signature.output_specs
    return [str(s.arg.name) for s in specs if s.kind in _RETURNED]


def input_names(exported: ExportedProgram) -> list[str]:
    """Names of the user inputs of `exported`, in the order of `flat_inputs`."""
    specs = exported.graph_signature.input_specs
    return [str(s.arg.name) for s in specs if s.kind == InputKind.USER_INPUT]


_RETURNED = (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Stands in the environment for a weight that is read where it is used."""

    name: str


class GraphRunner(fx.Interpreter):
    """Interprets an exported program in one floating dtype.

    Weights are read, converted and dropped at each use. What no output depends on isn't run, so
    checks of sizes and dtypes, which would fail in another dtype, are left out. Random numbers are
    the same in every run; those that nobody reads are drawn too, since others come after them.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        aliases: Mapping[str, str],
        stand_ins: Mapping[str, str] | None = None,
        *,
        removed: Collection[str] = (),
        watch: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """A runner; see `run_graph`.

        Args:
            exported: a program without in-place operators.
            weights: tensors by name.
            dtype: the floating dtype of everything.
            aliases: tied name to canonical name.
            stand_ins: value name to the name of an earlier value that takes its place.
            removed: names of values of removed layers, which draw no random numbers.
            watch: record in `nonfinite` which values hold NaN or infinity.
            device: of everything, whatever the graph says: weights and inputs come from where they
                are when they are used. None leaves all where it is.
        """
        super().__init__(exported.graph_module, garbage_collect_values=False)
        self.exported = exported
        self.device = device
        self._moved: dict[str, fx.GraphModule] = {}
        self.weights = weights
        self.dtype = dtype
        self.aliases = aliases
        self._known = frozenset(weights)
        self.watch = watch
        self.nonfinite: dict[str, None] = {}
        named = {node.name: node for node in self.graph.nodes}
        self._stand_ins = {named[a]: named[b] for a, b in (stand_ins or {}).items()}
        self._state = {
            spec.arg.name: spec.target
            for spec in exported.graph_signature.input_specs
            if spec.kind != InputKind.USER_INPUT and spec.target is not None
        }
        self._needed = {n for n in self.graph.nodes if draws(n) and n.name not in removed}
        self._bound: dict[fx.Node, dict[str, Any]] = {}
        self._free: set[fx.Node] = set()  # makes floating numbers, of no dtype that is given
        self._draws = any(
            draws(n) or isinstance(n.target, torch._ops.HigherOrderOperator)
            for n in self.graph.nodes
        )
        self.garbage_collect_values = True
        self.user_to_last_uses = self._last_uses()

    def outputs(self, inputs: Inputs) -> list[Any]:
        """Run on (args, kwargs); the flat user outputs.

        Raises:
            VerifyError: the inputs don't have the form of the example.
        """
        try:
            # The generator belongs to the whole process: only what draws from it borrows it.
            with torch.no_grad(), seeded() if self._draws else nullcontext():
                everything = self.run(
                    *flat_inputs(self.exported, inputs), enable_io_processing=False
                )
        finally:
            self.env.clear()
        specs = self.exported.graph_signature.output_specs
        return [v for v, s in zip(everything, specs, strict=True) if s.kind in _RETURNED]

    def run_node(self, n: fx.Node) -> Any:
        """The value of `n`; None where no output needs it."""
        if n.op == "placeholder":
            name = self._state.get(n.name)
            if name is not None:
                return _Stored(name)
            return self._finish(n, self._cast(next(self.args_iter)))
        if n not in self._needed:
            return None
        if n in self._stand_ins:
            return self._finish(n, self.env[self._stand_ins[n]])
        if n.op == "output":
            return self._run(n)
        if isinstance(n.target, torch._ops.HigherOrderOperator):
            with default_dtype(self.dtype):  # its graphs are not ours to run
                return self._finish(n, self._cast(self._run(n)))
        if not isinstance(n.target, torch._ops.OpOverload):
            return self._finish(n, self._cast(self._run(n)))
        return self._finish(n, self._call(n, n.target))

    def _run(self, n: fx.Node) -> Any:
        """As fx runs a node, but for telling the whole process which one it is."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """`args` with values in place of nodes; weights are read now."""

        def load(node: fx.Node) -> Any:
            value = self.env[node]
            return self._read(node, value.name) if isinstance(value, _Stored) else value

        return fx.map_arg(args, load)

    def _read(self, node: fx.Node, name: str) -> Any:
        """The weight `name`, for the placeholder `node`."""
        del node
        if name not in self._known:  # asking the mapping itself might read the tensor
            name = self.aliases.get(name, name)
        tensor = self.weights[name] if name in self._known else self.exported.constants[name]
        return self._cast(tensor.detach())

    def _call(self, node: fx.Node, target: torch._ops.OpOverload[..., Any]) -> Any:
        """Bind the arguments of an operator by name, put dtypes right and compute it."""
        bound = self._bound.get(node)
        if bound is None:
            made = {} if self.device is None else default_device(target, node)
            bound = self._bound[node] = {**made, **_bind(target, node)}
            if makes_floats(node):
                self._free.add(node)
        arguments = map_aggregate(self.map_nodes_to_values(bound, node), self._retyped)
        if self.device is not None and draws(node):
            return self._cast(self._drawn(target, arguments, bound))
        if "half_to_float" in arguments:  # only defined on half precision
            arguments = {**arguments, "half_to_float": False}
        if node in self._free:
            target, arguments = settled(target, arguments, self.dtype)
            return self._cast(self._compute(target, arguments, bound))
        return self._compute(target, dict(arguments), bound)

    def _compute(
        self,
        target: torch._ops.OpOverload[..., Any],
        arguments: dict[str, Any],
        nodes: Mapping[str, Any],
    ) -> Any:
        """The operator on `arguments`, which are the values of `nodes`."""
        if target is torch.ops.aten.view.dtype:  # of bits, which are those of the traced dtype
            bits = arguments["self"].to(nodes["self"].meta["val"].dtype)
            return self._cast(bits.view(nodes["dtype"]))
        if target is torch.ops.aten.view.default:
            # Kernels choose strides by dtype and size; a traced view insists on the dense ones.
            return arguments["self"].reshape(arguments["size"])
        return target(**arguments)

    def _drawn(
        self,
        target: torch._ops.OpOverload[..., Any],
        arguments: dict[str, Any],
        nodes: Mapping[str, Any],
    ) -> Any:
        """An operator that draws random numbers: the processor's, so that all devices agree."""
        here = map_aggregate(arguments, to_processor)
        if "dtype" in here:
            here["dtype"] = here["dtype"] or self.dtype
        return self._compute(target, here, nodes)

    def fetch_attr(self, target: str) -> Any:
        """What an attribute of the graph holds: graphs that operators run are on the device too."""
        found = super().fetch_attr(target)
        if self.device is None or not isinstance(found, fx.GraphModule):
            return found
        if target not in self._moved:
            self._moved[target] = moved_graphs(found, self.device)
        return self._moved[target]

    def _finish(self, node: fx.Node, value: Any) -> Any:
        """Called with every result; returns what the graph goes on with."""
        if self.watch and not all(map(_is_finite, _tensors(value))):
            self.nonfinite[node.name] = None
        return value

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.device is not None:
            value = value.to(self.device)  # narrow numbers travel, and are widened where they are
        return value.to(self._retyped(value.dtype))

    def _retyped(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return self.device or value
        if not isinstance(value, torch.dtype):
            return value
        if value.is_complex:
            return self.dtype.to_complex()
        return self.dtype if value.is_floating_point else value

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """What can be freed after each node; finds the needed nodes on the way."""
        freed: dict[fx.Node, list[fx.Node]] = {}
        for node in reversed(self.graph.nodes):
            if node.op != "output" and node not in self._needed:
                freed[node] = [node]
                continue
            reads = [self._stand_ins[node]] if node in self._stand_ins else node.all_input_nodes
            freed[node] = [r for r in reads if r not in self._needed]
            self._needed.update((node, *reads))
        return freed


def flat_inputs(exported: ExportedProgram, inputs: Inputs) -> list[Any]:
    """The leaves of (args, kwargs) in the order of the program's user inputs.

    Raises:
        VerifyError: the inputs don't have the form of the example.
    """
    spec = exported.call_spec.in_spec
    if spec is None:
        return pytree.tree_leaves(inputs)
    args, kwargs = inputs
    _, known = pytree.tree_unflatten(range(spec.num_leaves), spec)
    if set(known) == set(kwargs):
        kwargs = {name: kwargs[name] for name in known}
    leaves, given = pytree.tree_flatten((tuple(args), kwargs))
    if given != spec:
        raise VerifyError(
            "the inputs don't have the form that the model was traced with",
            why=f"traced with {spec}, given {given}",
            hint="give (args, kwargs) like the example inputs of the trace",
        )
    return leaves


def _bind(target: torch._ops.OpOverload[..., Any], node: fx.Node) -> dict[str, Any]:
    """The arguments in the graph by schema name, without defaults."""
    return dict(chain(zip(_positional(target), node.args, strict=False), node.kwargs.items()))


@cache
def _positional(target: torch._ops.OpOverload[..., Any]) -> tuple[str, ...]:
    """Names of the positional arguments; a schema makes them anew whenever it is asked."""
    return tuple(a.name for a in target._schema.arguments if not a.kwarg_only)


def _tensors(value: Any) -> Iterator[Tensor]:
    for v in value if isinstance(value, list | tuple) else (value,):
        if isinstance(v, Tensor):
            yield v


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
