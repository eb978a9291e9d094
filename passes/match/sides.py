"""The model that is trained and the dense one, each on its way through the samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram

from graphprune.calibration.batches import Batch
from graphprune.ir.torch.interpreter import flat_inputs
from graphprune.ir.torch.program import Program
from graphprune.passes.match.pieces import Pieces, Values
from graphprune.placement import present
from graphprune.placement.waiting import Room, Waiting
from graphprune.plan.plan import Plan
from graphprune.rewrite.slim import apply
from graphprune.streaming import Held
from graphprune.streaming.core.cache import Holder, nbytes

Sizes: TypeAlias = tuple[Any, ...]


class Side:
    """One of the two models: what of every sample waits at a place of its graph."""

    def __init__(
        self, pieces: Pieces, batches: Sequence[Batch], held: torch.dtype, sizes: Sequence[Sizes]
    ) -> None:
        """A model that nothing has run in yet."""
        self.pieces = pieces
        self.place = 0
        self._holder = Holder(pieces.dtype, Waiting.of(Held(held), present(), Room(0)))
        self._whole = Holder(pieces.dtype, Waiting.of(Held()))
        self._sizes = sizes
        leaves = (flat_inputs(pieces.exported, (b.args, b.kwargs)) for b in batches)
        self._values = [self._holder.pack(pieces.given(one)) for one in leaves]
        self._constants: dict[Sizes, Values] = {one: {} for one in sizes}

    def advance(self, place: int) -> None:
        """Take every sample to a place."""
        if place > self.place:
            with torch.no_grad():
                for i in range(len(self._values)):
                    self._values[i] = self._holder.pack(self.run(i, place))
            self._arrive(place)

    def run(self, sample: int, place: int) -> Values:
        """The values of one sample at a later place; it stays where it is."""
        values = self._holder.unpack(self._values[sample])
        constants = self._constants[self._sizes[sample]]
        return self.pieces.advance(values, constants, self.place, place)

    def value(self, sample: int, name: str) -> Tensor:
        """What waits under a name."""
        node = self.pieces.nodes[self.pieces.places[name]]
        found: Tensor = self._holder.unpack({node: self._values[sample][node]})[node]
        return found

    def saved(self) -> list[Mapping[str, Any]]:
        """All that waits, by name: of the samples, then of the sizes."""
        return [
            {n.name: v for n, v in values.items()}
            for values in (*self._values, *self._constants.values())
        ]

    def restore(self, place: int, saved: Sequence[Mapping[str, Any]]) -> None:
        """Take up what `saved` gave at a place."""
        named = {n.name: n for n in self.pieces.nodes}
        found = [{named[n]: v for n, v in values.items()} for values in saved]
        self._values, rest = found[: len(self._values)], found[len(self._values) :]
        self._constants = dict(zip(self._constants, map(present().bring, rest), strict=True))
        self.place = place

    def held_bytes(self) -> int:
        """Memory of what waits."""
        return nbytes({n.name: v for n, v in values.items()} for values in self._values)

    def held_names(self) -> frozenset[str]:
        """Names of what waits for every sample."""
        return frozenset(n.name for n in self._values[0])

    def _arrive(self, place: int) -> None:
        self.place = place
        self.pieces.forget()
        for size, values in self._constants.items():
            self._constants[size] = self._whole.pack(self.pieces.settle(values, place))


@dataclass(frozen=True)
class Trained:
    """The model that is trained: a program as a plan leaves it.

    Attributes:
        exported: its graph, whose values have the names of the dense ones.
        weights: tensors by the names of its graph.
        aliases: tied name to canonical name.
        names: canonical names of what can be trained, to those of the dense model.
        places: canonical name to the dense indices of each dimension, where some are gone.
    """

    exported: ExportedProgram
    weights: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    names: Mapping[str, str]
    places: Mapping[str, tuple[Tensor, ...]]

    @classmethod
    def of(cls, program: Program, plan: Plan) -> Trained:
        """What a plan leaves of a program.

        Raises:
            GraphPruneError: see `graphprune.apply`.
        """
        own = [n for n in program.parameters if n in program.trainable and n not in program.aliases]
        own = [n for n in own if program.weights[n].is_floating_point()]
        if not plan.kept_units:
            names = {n: n for n in own}
            return cls(program.exported, program.weights, program.aliases, names, {})
        slim = apply(program, plan)
        kept = plan.kept(program)
        names = {slim.renamed[n]: n for n in own if n in slim.renamed}
        places = {
            new: tuple(map(torch.from_numpy, kept[old]))
            for new, old in names.items()
            if tuple(map(len, kept[old])) != program.parameters[old]
        }
        return cls(slim.exported, slim.weights, slim.aliases, names, places)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """What the model has of a tensor of the dense parameter's shape."""
        where = self.places.get(name)
        return whole if where is None else whole[torch.meshgrid(*where, indexing="ij")]

    def whole(self, name: str, new: Tensor, old: Tensor) -> Tensor:
        """The dense parameter `old` with new values where the model has some."""
        where = self.places.get(name)
        if where is None:
            return new
        result = old.detach().clone()
        result[torch.meshgrid(*where, indexing="ij")] = new.to(result)
        return result


def sizes_of(program: Program, batches: Sequence[Batch]) -> list[Sizes]:
    """For each sample what constants depend on."""
    found = []
    for batch in batches:
        leaves = flat_inputs(program.exported, (batch.args, batch.kwargs))
        found.append(tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves))
    return found


def pieces_of(model: Trained | Program, dtype: torch.dtype, ends: Collection[str]) -> Pieces:
    """A model cut at some values."""
    trainable = model.names if isinstance(model, Trained) else model.trainable
    return Pieces(
        model.exported, model.weights, dtype, model.aliases, ends=ends, trainable=trainable
    )
