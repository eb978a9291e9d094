"""Running a traced program on calibration samples, as far as some of its values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.batches import Batch, batches
from graphprune.errors import PlanError
from graphprune.ir.torch.interpreter import flat_inputs
from graphprune.ir.torch.program import Program, is_traced
from graphprune.placement import present
from graphprune.ranks.group import current
from graphprune.streaming.core.layout import Matrix
from graphprune.streaming.core.padding import Padding
from graphprune.streaming.core.sites import Site, Sites
from graphprune.streaming.torch.runner import Runner, Values
from graphprune.streaming.torch.schedule import TorchSchedule
from graphprune.streaming.torch.sites import find_sites


class Route(TorchSchedule):
    """What runs, and how long each value lives, when some values are wanted.

    Attributes:
        wanted: the nodes of these values.
        stand_ins: node to the earlier one that takes its place.
    """

    def __init__(
        self,
        program: Program,
        sites: Sites,
        wanted: Collection[str],
        stand_ins: Mapping[str, str] | None = None,
    ) -> None:
        """The way to the values named `wanted`, past the keys of `stand_ins`."""
        known = {n.name: n for n in program.exported.graph.nodes}
        self.wanted = frozenset(known[name] for name in wanted)
        self.stand_ins = {known[a]: known[b] for a, b in (stand_ins or {}).items()}
        super().__init__(program, Sites((), {}, sites.all))

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """The values that must be there when `node` runs; no weights."""
        if node in self.stand_ins:
            return [self.stand_ins[node]]
        return super().reads(node)

    @cached_property
    def order(self) -> list[fx.Node]:
        """The operators that run, in order."""
        return [n for n in self.nodes if n in self.needed and n.op != "placeholder"]

    def _needed(self) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        waiting = list(self.wanted)
        while waiting:
            node = waiting.pop()
            if node not in needed and node not in self.weights:
                needed.add(node)
                waiting.extend(self.reads(node))
        return needed


class Forward(Runner):
    """Runs a program along a route, in float32 unless told otherwise, on the present device.

    Weights are read and converted where they are used, experts one by one; nothing else of a model
    is held.
    """

    schedule: Route

    def __init__(self, program: Program, route: Route, dtype: torch.dtype = torch.float32) -> None:
        """A runner of `program`, which isn't changed."""
        weight = program.weights.__getitem__
        super().__init__(program, route, dtype, weight, device=present().target)
        self._stand_ins = dict(route.stand_ins)

    def show(self, leaves: list[Any], see: Callable[[fx.Node, Any], None]) -> None:
        """Run one batch, and show every wanted value as soon as it is there.

        Args:
            leaves: the inputs, as `graphprune.ir.torch.interpreter.flat_inputs` gives them.
            see: called with each wanted value; the value is let go when nothing reads it any more.
        """
        values = self.given(leaves)
        for node in [n for n in values if n in self.schedule.wanted]:
            see(node, values[node])
        for node in self.schedule.order:
            values[node] = self.execute(node, values)
            if node in self.schedule.wanted:
                see(node, values[node])
            for dead in self.schedule.dead_after(self.schedule.places[node.name]):
                values.pop(dead, None)
        self.forget()

    def compute(
        self, nodes: Sequence[fx.Node], values: Values, keep: Collection[fx.Node]
    ) -> Values:
        """Run some nodes in order; what is left of their values.

        Args:
            nodes: in the order of the graph.
            values: of what they read and they don't compute.
            keep: the values to return.
        """
        values = dict(values)
        uses = {r: i for i, node in enumerate(nodes) for r in self.schedule.reads(node)}
        ends: dict[int, list[fx.Node]] = {}
        for value, i in uses.items():
            ends.setdefault(i, []).append(value)
        for i, node in enumerate(nodes):
            values[node] = self.execute(node, values)
            for dead in ends.get(i, ()):
                if dead not in keep:
                    values.pop(dead, None)
        self.forget()
        return {n: v for n, v in values.items() if n in keep}

    def _read(self, node: fx.Node, name: str) -> Any:
        """A weight, converted anew at each use: a wide copy of a whole model may not fit."""
        del node
        return self._cast(self.stored(name))


def sites_of(program: Program) -> Sites:
    """All products with weights; none where nothing is understood."""
    try:
        return find_sites(program)
    except PlanError:
        return Sites((), {}, {})


def traced_program(program: BaseProgram, score: str) -> Program:
    """`program`, if it can be run node by node.

    Raises:
        PlanError: it is a graph of another format, or has no weights.
    """
    if not is_traced(program):
        raise PlanError(
            f"score {score} runs a PyTorch graph, and this is one of another format",
            hint="use score magnitude, or prune the PyTorch model and export it",
        )
    if any(program.weights[n].is_meta for n in sorted(program.trainable)[:1]):
        raise PlanError(
            f"score {score} needs weights",
            why="the program was traced without them",
            hint="load the checkpoint with its weights, or take score random",
        )
    return program


def samples_of(program: Program, calibration: Any, score: str, batch: int) -> list[Batch]:
    """Calibration samples in the form that a program takes.

    Raises:
        PlanError: there are none, or they don't fit the program.
    """
    if calibration is None:
        raise PlanError(
            f"score {score} needs calibration data",
            hint="pass calibration=: token windows [windows, length], or samples as for "
            "graphprune.streaming.batches",
        )
    return batches(program, calibration, batch)


class Tokens:
    """The rows of values, one for each token that is no padding."""

    def __init__(self, program: Program) -> None:
        """The tokens of a program's values."""
        self._padding = Padding(program)

    def rows(self, name: str, x: Tensor, features: int, valid: Mapping[str, Tensor]) -> Tensor:
        """The tokens of a value.

        Args:
            name: of the value.
            x: the tensor.
            features: the dimension that a token has, counted from the end: -1 for the last.
            valid: see `graphprune.streaming.Batch`.

        Returns:
            ``[tokens, features]``, in the dtype of `x`.

        Raises:
            PlanError: there is padding, and it can't be told from the rest.
        """
        layout = Matrix(features=features)
        kept = self._padding.rows(Site(name, name, name, name, layout), x, valid) if valid else None
        flat = x.movedim(features, -1).flatten(0, -2)
        return flat if kept is None else flat[kept]


def show_all(
    program: Program,
    wanted: Collection[str],
    samples: Sequence[Batch],
    see: Callable[[str, Tensor, Batch], None],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run samples, and show the values named `wanted`; `after` is called after each batch.

    Processes that share a run show each the values of its own samples: what is made of them has to
    be added up.
    """
    forward = Forward(program, Route(program, sites_of(program), wanted))
    ranks = current()

    def run() -> None:
        for batch in (samples[n] for n in ranks.share([one.count for one in samples])):
            leaves = flat_inputs(program.exported, (batch.args, batch.kwargs))
            forward.show(leaves, lambda node, value, b=batch: see(node.name, value, b))  # type: ignore[misc]
            after()

    with torch.no_grad():
        ranks.agree(run)
