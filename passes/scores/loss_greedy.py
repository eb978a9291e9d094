"""Greedy removal of layers by what it does to the calibration loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Block, Structure
from graphprune.axes.expr import IntArray
from graphprune.errors import PlanError
from graphprune.ir.torch.interpreter import flat_inputs
from graphprune.ir.torch.program import Program
from graphprune.passes.shared.choice import Choice
from graphprune.passes.shared.forward import Forward, Route, sites_of, traced_program
from graphprune.passes.shared.gradients import next_token_loss
from graphprune.passes.shared.score import Inputs
from graphprune.passes.shared.similarity import only_blocks
from graphprune.placement import present
from graphprune.plan.kept import Units
from graphprune.plan.units import FloatArray
from graphprune.ranks.group import current
from graphprune.streaming.core.sites import Sites
from graphprune.streaming.torch.runner import Values

NAME = "loss-greedy"


@dataclass(frozen=True)
class LossGreedy:
    """Again and again the layer goes without which the calibration loss is lowest.

    Song et al., SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks, 2024 (arXiv:2402.09025). For each layer in question only what follows it is
    computed, from what the residual stream held before it, so that a search over L layers costs
    about L / 2 passes over the data it uses, and L evaluations of the output layer. The sets are
    nested: the order of the first k removals doesn't depend on how many follow.

    Attributes:
        windows: calibration windows (batches, where calibration is no tensor) that the search uses,
            the first ones; None for all.
        batch: windows per forward pass, where calibration is a tensor.
        depth: the fraction of the layers that searches go down to; the rest follow by the losses of
            the last search. There are no more searches than layers go.
    """

    needs_data: ClassVar[bool] = True
    windows: int | None = None
    batch: int = 4
    depth: float = 0.5

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.windows is not None and self.windows < 1):
            raise PlanError("a search uses at least one window", where=f"score {NAME}")
        if not 0 < self.depth <= 1:
            raise PlanError(
                f"depth {self.depth} is no fraction of the layers", where=f"score {NAME}"
            )

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """The position of every layer in the order of removal, from 0.

        Layers that can't be removed come last. See `graphprune.passes.shared.score.Score`.

        Raises:
            PlanError: see `choose`.
        """
        scores = {}
        for s in structures:
            found = self.choose(program, s, np.array([b.index for b in s.blocks]), inputs)
            order = found.order(found.limit)
            scores[s.name] = np.full((1, s.size), float(len(order)))
            scores[s.name][0, order] = np.arange(len(order))
        return scores

    def choose(
        self, program: BaseProgram, structure: Structure, removable: IntArray, inputs: Inputs
    ) -> GreedyOrder:
        """The order of removal of a stack's layers; see `graphprune.passes.shared.choice.Chooser`.

        Raises:
            PlanError: the structure is no stack of layers, the model is no PyTorch graph, or there
                is no calibration data.
        """
        (stack,) = only_blocks([structure], NAME)
        traced = traced_program(program, NAME)
        if inputs.calibration is None:
            raise PlanError(
                f"score {NAME} needs calibration data",
                hint="pass calibration=: token windows [windows, length], or batches with a loss=",
            )
        data = list(self._batches(inputs.calibration))
        if not data:
            raise PlanError("there is no calibration data", hint="give at least one batch")
        blocks = {b.index: b for b in stack.blocks if b.index in set(removable.tolist())}
        limit = math.ceil(self.depth * len(blocks))
        return GreedyOrder(traced, stack, blocks, inputs, data, limit, sites_of(traced))

    def _batches(self, calibration: Any) -> Iterator[tuple[Any, int]]:
        """Batches, and the number of windows in each."""
        if isinstance(calibration, Tensor):
            chosen = calibration[: self.windows]
            for start in range(0, len(chosen), self.batch):
                part = chosen[start : start + self.batch]
                yield part, len(part)
            return
        for batch in list(calibration)[: self.windows]:
            yield batch, len(batch) if isinstance(batch, Tensor) else 1


@dataclass
class GreedyOrder(Choice):
    """The layers of a stack in the order in which they go, found as far as it is asked for.

    Attributes:
        program: the program.
        structure: the stack.
        blocks: the layers that may go, by number.
        inputs: give the loss.
        data: batches, and the number of windows in each.
        limit: searches that there are at most.
        sites: products with weights.
        removed: numbers of layers, in order.
        losses: of every layer that could have gone instead of the last removed one, with it.
        searches: number of layers that were tried.
    """

    program: Program
    structure: Structure
    blocks: Mapping[int, Block]
    inputs: Inputs
    data: Sequence[tuple[Any, int]]
    limit: int
    sites: Sites
    removed: list[int] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    searches: int = 0

    def kept(self, count: int) -> Units:
        """All layers but the first to go; see `Choice`."""
        n = self.structure.size - count
        gone = set(self.order(n)[:n])
        return tuple(i for i in range(self.structure.size) if i not in gone)

    def order(self, depth: int) -> list[int]:
        """All layers that may go: so many of them in the order of removal, then the others."""
        while len(self.removed) < min(depth, self.limit):
            self._remove()
        rest = [i for i in self.losses if i not in self.removed]
        return [*self.removed, *sorted(rest, key=lambda i: (self.losses[i], -i))]

    def _remove(self) -> None:
        left = [b for i, b in self.blocks.items() if i not in self.removed]
        gone = [self.blocks[i] for i in self.removed]
        self.losses = losses_without(self.program, gone, left, self.inputs, self.data, self.sites)
        self.searches += len(left)
        if not any(map(math.isfinite, self.losses.values())):
            raise PlanError(
                "the calibration loss is not a finite number, whichever layer goes",
                where=f"structure {self.structure.name}, score {NAME}",
                hint="check the calibration data and the checkpoint for NaN",
            )
        self.removed.append(min(self.losses, key=lambda i: (self.losses[i], -i)))


def losses_without(
    program: Program,
    gone: Sequence[Block],
    candidates: Sequence[Block],
    inputs: Inputs,
    data: Sequence[tuple[Any, int]],
    sites: Sites,
) -> dict[int, float]:
    """The mean calibration loss without some layers and one of the candidates, for each of them.

    Args:
        program: the program, which isn't changed.
        gone: layers that are removed in any case.
        candidates: layers of the same stack.
        inputs: give the loss.
        data: batches, and the weight of each.
        sites: products with weights.

    Returns:
        Number of the layer to loss; infinity where the loss is no finite number.
    """
    model = _Suffixes(program, gone, candidates, sites)
    windows = sum(count for _, count in data)
    total = {b.index: 0.0 for b in candidates}
    ranks = current()

    def run() -> None:
        for batch, count in (data[n] for n in ranks.share([count for _, count in data])):
            batch = present().bring(batch)
            model.forget()
            for block in candidates:
                model.skip(block)
                loss: Any = (
                    next_token_loss(program, model, batch)
                    if inputs.loss is None
                    else inputs.loss(model, batch)
                )
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise PlanError(
                        "the calibration loss is not a scalar", hint="take its mean or its sum"
                    )
                value = float(loss)
                total[block.index] += value * count / windows if math.isfinite(value) else math.inf

    with torch.no_grad():
        ranks.agree(run)
    sums = ranks.add(torch.tensor(list(total.values()), dtype=torch.float64))
    return dict(zip(total, sums.tolist(), strict=True))


class _Suffixes:
    """A model that leaves one layer out, and computes only what that changes.

    What comes before is kept from call to call, for every call that a loss makes of the model.
    """

    def __init__(
        self, program: Program, gone: Sequence[Block], candidates: Sequence[Block], sites: Sites
    ) -> None:
        self.exported = program.exported
        self.returned: list[Any] = pytree.tree_leaves(self.exported.graph.output_node().args)
        results = [n.name for n in self.returned if isinstance(n, fx.Node)]
        self.route = Route(program, sites, results, {b.exit: b.entry for b in gone})
        self.runner = Forward(program, self.route)
        self.changed = {b.index: self._changed(b) for b in candidates}
        self.keep: set[fx.Node] = set().union(*map(self._read, candidates))
        self.prefix = self._leading_to(self.keep)
        self.skipped = candidates[0]
        self.calls = 0
        self.known: list[tuple[list[Any], Values]] = []

    def skip(self, block: Block) -> None:
        """Leave this layer out from now on."""
        self.skipped, self.calls = block, 0

    def forget(self) -> None:
        """Let go of what was computed for a batch."""
        self.known.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns without the layer, in the form that the source returns it."""
        leaves = flat_inputs(self.exported, (args, kwargs))
        if self.calls >= len(self.known) or not _same(self.known[self.calls][0], leaves):
            found = self.runner.compute(self.prefix, self.runner.given(leaves), self.keep)
            self.known[self.calls :] = [(leaves, found)]
        values = dict(self.known[self.calls][1])
        self.calls += 1
        entry, last = (self.route.named[n] for n in (self.skipped.entry, self.skipped.exit))
        values[last] = values[entry]
        values = self.runner.compute(self.changed[self.skipped.index], values, self.route.wanted)
        flat = [self._result(n, values) for n in self.returned]
        spec = self.exported.call_spec.out_spec
        return flat if spec is None else pytree.tree_unflatten(flat, spec)

    def _result(self, returned: Any, values: Values) -> Any:
        if not isinstance(returned, fx.Node):
            return returned
        if returned in self.route.weights:
            return present().bring(self.runner.stored(self.route.weights[returned]))
        return values[returned]

    def _changed(self, block: Block) -> list[fx.Node]:
        """What is computed from the result of a layer."""
        last = self.route.named[block.exit]
        changed = {last}
        for node in self.route.order:
            if any(n in changed for n in self.route.reads(node)):
                changed.add(node)
        return [n for n in self.route.order if n in changed and n is not last]

    def _read(self, block: Block) -> set[fx.Node]:
        """What has to be there to run what a layer changes, and what it doesn't change."""
        changed = {*self.changed[block.index], self.route.named[block.exit]}
        read = {n for node in self.changed[block.index] for n in self.route.reads(node)}
        read |= self.route.wanted - self.route.weights.keys()
        return (read - changed) | {self.route.named[block.entry]}

    def _leading_to(self, values: set[fx.Node]) -> list[fx.Node]:
        needed: set[fx.Node] = set()
        waiting = list(values)
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting.extend(self.route.reads(node))
        return [n for n in self.route.order if n in needed]


def _same(known: Sequence[Any], given: Sequence[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(known, given, strict=True)
    )
