"""In-place operators written out: every write to a tensor makes a new one.

The graph is written anew, node by node. A tensor that is written to, and all that shares memory
with it, has a *current* node. A write computes new values for the name that it goes by, and takes
them back along the views to the tensor that owns the memory; other names of that memory are viewed
again where somebody next reads them. Nothing else of the graph changes, so that the work grows with
the writes, and operators stay whole.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from graphprune.frontends.tracing.aliases import Aliases, viewed
from graphprune.frontends.tracing.emitter import Emitter
from graphprune.frontends.tracing.stand_ins import (
    StandIns,
    same_layout,
    same_memory,
    same_sizes,
    same_strides,
)
from graphprune.frontends.tracing.views import View, by_numbers, inverse

aten = torch.ops.aten

_WRITTEN = {
    InputKind.BUFFER: OutputKind.BUFFER_MUTATION,
    InputKind.USER_INPUT: OutputKind.USER_INPUT_MUTATION,
}


class Unsupported(Exception):
    """A write that can't be written out here."""


def written_out(
    exported: ExportedProgram, writes: Mapping[fx.Node, Any], aliases: Aliases
) -> ExportedProgram:
    """`exported` without in-place operators.

    Args:
        exported: stays as it is.
        writes: in-place node to the functional operator that computes the same.
        aliases: what may share memory in it.

    Returns:
        A program with the same inputs and outputs, and with an output more for each input or
        buffer that is written to, as torch's own functionalisation has it.

    Raises:
        Unsupported: it can't be done here.
    """
    return _Writer(exported, writes, aliases).run()


@dataclass(eq=False)
class _Memory:
    """What a tensor and its views share.

    Attributes:
        version: how often it has been written to.
    """

    version: int = 0


@dataclass(eq=False)
class _Name:
    """A tensor that may share memory with others.

    Attributes:
        memory: what it shares.
        like: what stands in for it on the meta device.
        current: the new graph's node for it, as of `version` of the memory.
        version: see `current`.
        view: how it is seen in `source`; None where it owns the memory.
        source: see `view`.
        call: the old node of a view.
    """

    memory: _Memory
    like: torch.Tensor
    current: fx.Node
    version: int
    view: View | None = None
    source: _Name | None = None
    call: fx.Node | None = None

    def chain(self) -> list[_Name]:
        """From the tensor that owns the memory to this one."""
        found = [self]
        while found[-1].source is not None:
            found.append(found[-1].source)
        return found[::-1]

    def is_dense(self) -> bool:
        """Whether it shows all of its memory, once."""
        return self.like.numel() == self.chain()[0].like.numel()


class _Writer:
    def __init__(
        self, exported: ExportedProgram, writes: Mapping[fx.Node, Any], aliases: Aliases
    ) -> None:
        self.exported = exported
        self.writes = writes
        self.shared = {member for node in writes for member in aliases.of(node)}
        self.like = StandIns(exported)
        self.emit = Emitter(exported.graph)
        self.copies: dict[fx.Node, fx.Node] = {}
        self.names: dict[fx.Node, _Name] = {}  # by old node
        self.several: dict[fx.Node, list[tuple[_Name, fx.Node]]] = {}  # what results may view
        self.owners: dict[str, _Name] = {}  # by input
        self.replays: dict[tuple[fx.Node, int], fx.Node] = {}

    def run(self) -> ExportedProgram:
        specs = list(self.exported.graph_signature.output_specs)
        for node in self.exported.graph.nodes:
            self.emit.at = node
            if node in self.writes:
                self._write(node)
            elif node.op == "output":
                specs = self._output(node)
            else:
                self._copy(node)
        self.emit.drop_unread(self.copies[node] for node in self.copies if viewed(node))
        dense = self.exported
        return ExportedProgram(
            root=dense.graph_module,
            graph=self.emit.graph,
            graph_signature=ExportGraphSignature(dense.graph_signature.input_specs, specs),
            state_dict=dense.state_dict,
            range_constraints=dense.range_constraints,
            module_call_graph=dense.module_call_graph,
            example_inputs=dense.example_inputs,
            constants=dense.constants,
            verifiers=dense.verifiers,
        )

    def _copy(self, node: fx.Node) -> None:
        """Take a node over that writes nothing."""
        owner = node.args[0] if node.target is operator.getitem else None
        if isinstance(owner, fx.Node) and owner in self.several:
            index: Any = node.args[1]
            self._result(node, owner, index)
            return
        new = self.copies[node] = self.emit.copy(node, self._current)
        if node not in self.shared:
            return
        operands = [(self.names[n], self._current(n)) for n in viewed(node) if n in self.names]
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            if operands and isinstance(val, list | tuple):
                self.several[node] = operands
            return
        if operands:
            result = self._called(node)[0]
            for source, operand in operands:
                if same_memory(result, source.like):
                    self._view(node, node, new, result, (source, operand))
                    return
        self._own(node, new)

    def _own(self, node: fx.Node, new: fx.Node) -> None:
        """A tensor with memory of its own."""
        name = self.names[node] = _Name(_Memory(), self.like.of(node), new, 0)
        if node.op == "placeholder":
            self.owners[node.name] = name

    def _result(self, node: fx.Node, owner: fx.Node, index: int) -> None:
        """One of several results of a call."""
        result = self._called(owner)[index]
        new = self.copies[node] = self.emit.copy(node, self._current)
        for source, operand in self.several[owner]:
            if same_memory(result, source.like):
                self._view(node, owner, new, result, (source, operand), index)
                return
        self._own(node, new)

    def _view(
        self,
        node: fx.Node,
        call: fx.Node,
        new: fx.Node,
        like: torch.Tensor,
        seen: tuple[_Name, fx.Node],
        index: int | None = None,
    ) -> None:
        """A tensor that is seen in another one, by a call or by one of its results."""
        source, operand = seen
        made = self.copies[call]
        val, whole = operand.meta["val"], call.meta["val"]
        same = same_layout(like, source.like) and same_sizes(node.meta["val"], val)
        view = View(made.target, made.args, made.kwargs, operand, index, whole, same)
        if view.name == "as_strided":
            source, view = self._strided(new, view, source)
        self.like.put(node, like)
        name = self.names[node] = _Name(source.memory, like, new, -1, view, source, call)
        # It may have been written to between the call and the choice of a result.
        name.version = source.memory.version if self._is_current(operand, source) else -1

    def _is_current(self, operand: fx.Node, source: _Name) -> bool:
        return source.version == source.memory.version and source.current is operand

    def _strided(self, new: fx.Node, view: View, source: _Name) -> tuple[_Name, View]:
        """A view of memory itself, whatever it was called on."""
        owner = source.chain()[0]
        open_ = any(not isinstance(n, int) for n in view.source.meta["val"].shape)
        given = view.given
        if open_ or not owner.like.is_contiguous() or owner.like.dtype != view.val.dtype:
            raise Unsupported
        offset = given["storage_offset"]
        if offset is None:
            offset = source.like.storage_offset()
        operand = self._read(owner)
        args = new.args = (operand, given["size"], given["stride"], offset)
        return owner, View(view.target, args, {}, operand, None, view.whole, same=False)

    def _called(self, node: fx.Node) -> list[Any]:
        """What a call returns for stand-ins.

        Raises:
            Unsupported: it can't be called on them.
        """
        try:
            return self.like.results(node)
        except Exception as error:  # operators raise whatever they like
            raise Unsupported from error

    def _write(self, node: fx.Node) -> None:
        """A node that gives new values to its first operand."""
        target = self.writes[node]
        first: Any = node.args[0]
        name = self.names.get(first)
        if name is None:
            raise Unsupported
        if torch.Tag.inplace_view in node.target.tags:  # type: ignore[union-attr]
            self._rename(node, target, name)
            return
        others = fx.map_arg((node.args[1:], node.kwargs), self._current)
        whole = name
        if node.target is aten.fill_diagonal_.default:
            name, others = self._diagonal(name), ((node.args[1],), {})
            if len(node.args) > 2 or node.kwargs:
                raise Unsupported
        value = self._computed(node, target, name, others)
        self._put(name, value)
        self.names[node] = whole
        self.like.put(node, whole.like)

    def _computed(self, node: fx.Node, target: Any, name: _Name, others: Any) -> fx.Node:
        """The new values that a node gives to a tensor, which lie in memory as the old ones do."""
        current = self._read(name)
        val = current.meta["val"]
        like = self._result_like(node, target, name)
        if like.shape != name.like.shape:
            raise Unsupported
        kept = like.dtype == name.like.dtype
        looks = val if kept else torch.empty_like(val, dtype=like.dtype)
        args = (current, *others[0])
        value = self.emit.call(target, args, others[1], val=looks, name=node.name)
        if not kept:
            value = self.emit.call(aten.to.dtype, (value, name.like.dtype), val=val)
        if not same_strides(like, name.like) and name.is_dense():
            value = self.emit.call(aten.copy.default, (current, value), val=val)
        return value

    def _result_like(self, node: fx.Node, target: Any, name: _Name) -> torch.Tensor:
        """What stands in for what the functional operator returns."""
        given = fx.map_arg((node.args[1:], node.kwargs), self.like.of)
        try:
            with torch.no_grad():
                found = target(name.like, *given[0], **given[1])
        except Exception:  # what depends on values, as masks do, has the form of what it changes
            if torch.Tag.pointwise in target.tags:
                raise
            found = torch.empty_like(name.like)
        return found if isinstance(found, torch.Tensor) else name.like

    def _diagonal(self, name: _Name) -> _Name:
        """The diagonal of a matrix."""
        if name.like.dim() != 2:
            raise Unsupported
        operand = self._read(name)
        new = self.emit.call(aten.diagonal.default, (operand,))
        like = name.like.diagonal()
        val = new.meta["val"]
        view = View(aten.diagonal.default, (operand,), {}, operand, None, val, same=False)
        return _Name(name.memory, like, new, name.memory.version, view, name)

    def _rename(self, node: fx.Node, target: Any, name: _Name) -> None:
        """A node that lets a tensor show its memory in another way (``x.t_()``)."""
        operand = self._read(name)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._current)
        given, named = fx.map_arg((node.args[1:], node.kwargs), self.like.of)
        like = target(name.like, *given, **named)
        if not same_memory(like, name.like) or target._opname == "as_strided":
            raise Unsupported
        val = node.meta["val"]
        new = self.emit.call(target, args, kwargs, val=val, name=node.name)
        same = same_layout(like, name.like)
        view = View(target, new.args, new.kwargs, operand, None, val, same)
        renamed = _Name(name.memory, like, new, name.memory.version, view, name, node)
        for old in [n for n, known in self.names.items() if known is name] + [node]:
            self.names[old] = renamed
            self.like.put(old, like)

    def _current(self, node: fx.Node) -> fx.Node:
        """The new graph's node for a value, as it is now."""
        return self._read(self.names[node]) if node in self.names else self.copies[node]

    def _read(self, name: _Name) -> fx.Node:
        memory = name.memory
        if name.version < memory.version:
            view, source = name.view, name.source
            assert view is not None  # owners are always current
            assert source is not None
            below = self._read(source)
            name.current = below if view.same else self._replay(name, view, below)
            name.version = memory.version
        return name.current

    def _replay(self, name: _Name, view: View, source: fx.Node) -> fx.Node:
        if view.index is None:
            return view.replay(self.emit, source, whole=view.whole)
        assert name.call is not None  # there is one wherever there are several results
        key = name.call, name.memory.version
        if key not in self.replays:
            self.replays[key] = view.replay(self.emit, source, whole=view.whole)
        return self.emit.call(operator.getitem, (self.replays[key], view.index), val=view.val)

    def _put(self, name: _Name, value: fx.Node) -> None:
        """Take new values of a tensor to all that it is a view of."""
        chain = name.chain()
        unknown = next((i for i, n in enumerate(chain) if n.view and not inverse(n.view)), None)
        current = [(name, value)]
        if unknown is not None:
            chain, views = chain[:unknown], [n.view for n in chain[unknown:] if n.view is not None]
            source = chain[-1]
            if any(v.val.dtype != source.like.dtype for v in views):
                raise Unsupported
            old = self._read(source)
            value = by_numbers(self.emit, views, value, old)
            if not source.like.is_contiguous() and source.is_dense():
                value = self.emit.call(aten.copy.default, (old, value), val=old.meta["val"])
            current.append((source, value))
        for below in reversed(chain):
            view, source_name = below.view, below.source
            if view is None or source_name is None:
                break
            undo = inverse(view)
            assert undo is not None  # or it would have gone by numbers
            value = undo(self.emit, view, value, self._read(source_name))
            current.append((source_name, value))
        name.memory.version += 1
        for one, now in current:
            one.current, one.version = now, name.memory.version

    def _output(self, node: fx.Node) -> list[OutputSpec]:
        """The output node, and what it returns."""
        new = self.copies[node] = self.emit.copy(node, self._current)
        returned: Any = new.args[0]
        written: list[fx.Node] = []
        specs: list[OutputSpec] = []
        for spec in self.exported.graph_signature.input_specs:
            name = self.owners.get(spec.arg.name)
            if name is None or not name.memory.version:
                continue
            if spec.kind not in _WRITTEN:
                raise Unsupported
            written.append(self._read(name))
            arg = TensorArgument(name=written[-1].name)
            specs.append(OutputSpec(_WRITTEN[spec.kind], arg, spec.target or spec.arg.name))
        for spec, value in zip(self.exported.graph_signature.output_specs, returned, strict=True):
            arg = TensorArgument(name=value.name) if isinstance(value, fx.Node) else spec.arg
            same = not isinstance(spec.arg, TensorArgument)
            specs.append(spec if same else OutputSpec(spec.kind, arg, spec.target))
        new.args = ((*written, *returned),)
        return specs
