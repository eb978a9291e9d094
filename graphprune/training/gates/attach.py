"""Gates laid on a model that trains: on its weights, and on what notices which units there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.analysis.structure import Structure
from graphprune.axes import Dims
from graphprune.errors import PlanError, TrainingError
from graphprune.ir.torch.program import Program
from graphprune.ops import find_op
from graphprune.oracle.masked_ops import Call
from graphprune.plan.units import NONE
from graphprune.streaming.consumers import owning_units
from graphprune.training.gates.gates import Gates, Gating
from graphprune.training.gates.places import Places
from graphprune.training.model.trainable import Trainable


def attach(trainable: Trainable, gates: Gates, places: Places, program: Program) -> None:
    """Lay gates on a model.

    Args:
        trainable: what trains of it; a graph, where something notices units.
        gates: of all structures in `places`.
        places: where they multiply.
        program: whose graph the places are of.

    Raises:
        PlanError: what notices units can't tell which they are.
    """
    for name, own in places.by_parameter.items():
        weight = trainable.weight(name)
        trainable.parametrize(name, Gating(gates, own, weight))
    if places.noticing:
        _leave_out(trainable.student.module, gates, places.noticing, program)


def _leave_out(
    module: nn.Module, gates: Gates, noticing: Mapping[str, tuple[Structure, ...]], program: Program
) -> None:
    """Have operators of a graph leave closed units out."""
    assert isinstance(module, fx.GraphModule)
    nodes = {n.name: n for n in module.graph.nodes}
    traced = {n.name: n for n in program.exported.graph.nodes}
    for number, (name, structures) in enumerate(noticing.items()):
        node = nodes[name]
        operand: Any = traced[name].args[0]  # which training may look into on the way
        (dims, *_) = program.typing.values[operand.name]
        place = f"_noticing_{number}"
        module.add_submodule(place, _Noticing(gates, node.target, dims, structures, name))
        with module.graph.inserting_after(node):
            new = module.graph.call_module(place, node.args, node.kwargs)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.recompile()


class _Noticing(nn.Module):
    """An operator computed over the units whose gates are open."""

    def __init__(
        self, gates: Gates, target: Any, dims: Dims, structures: tuple[Structure, ...], name: str
    ) -> None:
        super().__init__()
        schema = target._schema
        self._gates, self._target, self._name, self._rank = gates, target, name, len(dims)
        self._formula = find_op(schema.name.replace("::", ".")).masked
        self._positional = [a.name for a in schema.arguments if not a.kwarg_only]
        self._units: list[tuple[str, int, Tensor]] = []
        for structure in structures:
            found = [(d, owning_units(e, structure)) for d, e in enumerate(dims)]
            lying = [(d, u) for d, u in found if u is None or (u != NONE).any()]
            if len(lying) != 1 or lying[0][1] is None:
                raise PlanError(
                    f"{structure.role or 'a structure'} offers no place for gates",
                    where=structure.name,
                    why=f"{name} notices its units, and can't tell which they are",
                )
            ((dim, units),) = lying
            self._units.append((structure.name, dim, torch.as_tensor(units)))

    def forward(self, *given: Any, **named: Any) -> Any:
        """The operator's result."""
        arguments = dict(zip(self._positional, given, strict=False)) | named
        x = given[0]
        kept = torch.ones([1] * self._rank, dtype=torch.bool, device=x.device)
        for structure, dim, units in self._units:
            open_ = self._gates.value(structure).detach() > 0
            if len(units) != x.shape[dim]:
                raise TrainingError(
                    "the size of a gated axis can't be followed",
                    where=self._name,
                    why=f"it has {x.shape[dim]} indices here, and {len(units)} in the example",
                    hint="train with inputs of the example's shapes",
                )
            at = units.to(x.device)
            lies = torch.where(at == NONE, True, open_.to(x.device)[at.clamp_min(0)])
            if lies.any():  # without any unit nothing reads the result
                kept = kept & lies.view([-1 if d == dim else 1 for d in range(self._rank)])
        if bool(kept.all()):
            return self._target(**arguments)
        operand = self._positional[0]
        arguments[operand] = x.masked_fill(~kept, 0)
        assert self._formula is not None
        return self._formula(Call(self._target, arguments, operand, kept))
