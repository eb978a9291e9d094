"""Pruning a module while somebody's loop trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from graphprune.errors import TrainingError
from graphprune.training.core.processes import full
from graphprune.training.model.held import hold
from graphprune.training.schedule.choose import next_masks, scores_of
from graphprune.training.schedule.options import GradualPruning
from graphprune.training.schedule.packed import pack, unpack
from graphprune.training.schedule.targets import find_targets


@dataclass(frozen=True)
class Pruned:
    """What gradual pruning has made.

    Attributes:
        options: what was asked for.
        masks: parameter name to bool of its shape, True where a weight stays.
        events: the step of each pruning, and the zeros after it.
        notes: what people should know.
    """

    options: GradualPruning
    masks: Mapping[str, Tensor]
    events: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()

    @property
    def zeros(self) -> dict[str, int]:
        """Pruned weights of each parameter."""
        return {n: m.numel() - int(m.count_nonzero()) for n, m in self.masks.items()}

    @property
    def sparsity(self) -> float:
        """The share of the chosen weights that is zero."""
        return sum(self.zeros.values()) / max(1, sum(m.numel() for m in self.masks.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain data for a report."""
        weights = {
            name: {"zeros": self.zeros[name], "weights": mask.numel()}
            for name, mask in self.masks.items()
        }
        return {
            "options": self.options.to_json(),
            "sparsity": self.sparsity,
            "parameters": weights,
            "events": [{"step": step, "zeros": zeros} for step, zeros in self.events],
            "notes": list(self.notes),
        }


class GradualPruner:
    """Prunes a module in the course of its training, and holds what it has pruned.

        pruner = GradualPruner(module, GradualPruning(sparsity=0.6), optimizer)
        for step, batch in enumerate(batches, 1):
            ...
            optimizer.step()
            optimizer.zero_grad()
            pruner.update(step, len(batches))
        pruned = pruner.finish()

    In several processes each of them does the same: whole weights are gathered where FSDP2 has
    shared them out, and all processes choose alike.
    """

    def __init__(
        self, module: nn.Module, options: GradualPruning, optimizer: Optimizer | None = None
    ) -> None:
        """Choose the parameters; nothing is pruned yet.

        Args:
            module: the model; what wraps it may do so before or after.
            options: what to prune, and when.
            optimizer: see `graphprune.training.hold`.

        Raises:
            TrainingError: nothing can be pruned so, or the optimiser is none of torch.
        """
        self.module = module
        self.options = options
        self._targets = find_targets(module, options)
        self._removed: dict[str, Tensor] = {}
        self._held = hold(module, {}, optimizer)
        self._events: list[tuple[int, int]] = []
        self._sparsity = 0.0
        self._seen = -1

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name to bool of its shape, True where a weight stays."""
        return {t.name: ~self._gone(t.name) for t in self._targets}

    @property
    def is_done(self) -> bool:
        """Whether all zeros are in place."""
        return self._sparsity >= self.options.target

    @torch.no_grad()
    def update(self, step: int, steps: int) -> bool:
        """Prune if it is time; to be called after each step of the optimiser.

        Args:
            step: steps done.
            steps: of the whole training.

        Returns:
            Whether weights were pruned.

        Raises:
            TrainingError: a weight is NaN or infinite.
        """
        seen, self._seen = self._seen, step
        if self.is_done or not self.options.is_due(step, steps, seen):
            return False
        return self._prune(step, self.options.sparsity_at(step, steps))

    def clear_gradients(self) -> None:
        """Zeros into the gradients of what is pruned, which clipping would count in their norm."""
        self._held.fill_gradients()

    def check(self) -> None:
        """Make sure that every zero is one.

        Raises:
            TrainingError: one isn't.
        """
        self._held.check()

    def finish(self) -> Pruned:
        """End of training: the zeros are counted, and the weights let go.

        Where training has stopped before its schedule ended, what is missing is pruned now, so that
        the count is right in any case; a note says so.

        Raises:
            TrainingError: a zero isn't one, as when older weights were loaded.
        """
        self.check()
        notes: tuple[str, ...] = ()
        if not self.is_done:
            before = self._events[-1][1] if self._events else 0
            with torch.no_grad():
                self._prune(max(0, self._seen), self.options.target)
            added = self._events[-1][1] - before
            notes = (
                f"training ended before the schedule did: {added:,} weights were pruned after the "
                "last step, and nothing has trained since",
            )
        self.check()
        self._held.remove()
        return Pruned(self.options, self.masks, tuple(self._events), notes)

    def remove(self) -> None:
        """Let the weights go without ending anything."""
        self._held.remove()

    def state_dict(self) -> dict[str, Any]:
        """What another pruner needs to go on: options and masks, as numbers, words and tensors."""
        return {
            "options": self.options.to_json(),
            "events": [list(event) for event in self._events],
            "seen": self._seen,
            "sparsity": self._sparsity,
            "masks": {name: pack(gone) for name, gone in self._removed.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state: of a pruner with the same options, for a module of the same shapes.

        Raises:
            TrainingError: it is another's.
        """
        ours, theirs = self.options.to_json(), state["options"]
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise TrainingError(
                    "pruning can't go on with other options",
                    where=key,
                    why=f"it was begun with {theirs.get(key)!r}, and this is {value!r}",
                    hint="take the options that it was begun with",
                )
        removed: dict[str, Tensor] = {}
        for name, packed in state["masks"].items():
            if name not in {t.name for t in self._targets}:
                raise TrainingError(
                    "the saved masks are of another model", where=name, why="it has no such weight"
                )
            weight = self.module.get_parameter(name)
            removed[name] = unpack(packed, weight.shape, name).to(weight.device)
        self._removed = removed
        self._events = [(int(step), int(zeros)) for step, zeros in state["events"]]
        self._seen, self._sparsity = int(state["seen"]), float(state["sparsity"])
        self._held.change({name: ~gone for name, gone in removed.items()})

    def _gone(self, name: str) -> Tensor:
        found = self._removed.get(name)
        if found is None:
            weight = self.module.get_parameter(name)
            return torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        return found

    def _prune(self, step: int, sparsity: float) -> bool:
        """Remove up to a sparsity, if that is more than is removed already."""
        if sparsity <= self._sparsity:
            return False
        alone = self.options.scope == "layer"
        together = [(t,) for t in self._targets] if alone else [self._targets]
        found: dict[str, Tensor] = {}
        for targets in together:
            scores = {t.name: self._scores(t.name) for t in targets}
            removed = {t.name: self._gone(t.name) for t in targets}
            found |= next_masks(targets, scores, removed, sparsity, self.options)
        self._removed, self._sparsity = found, sparsity
        self._held.change({name: ~gone for name, gone in found.items()})
        self._events.append((step, sum(int(gone.count_nonzero()) for gone in found.values())))
        return True

    def _scores(self, name: str) -> Tensor:
        return scores_of(name, full(self.module.get_parameter(name)), self.options)
