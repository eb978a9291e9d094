"""A callback of transformers' Trainer that prunes on a schedule, and writes in the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from graphprune.errors import TrainingError
from graphprune.frontends.tracing.trace import unwrap
from graphprune.integrations.sparse_output import check_free, finish
from graphprune.training import GradualPruner, GradualPruning, Pruned
from graphprune.training.schedule.text import from_text, to_text

logger = logging.getLogger(__name__)


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model of a Trainer while that trains it.

        callback = PruningCallback(GradualPruning(sparsity=0.6), output="sparse")
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()

    Steps are those of the optimiser, however many micro-batches each has, and the schedule goes to
    the last of them. Checkpoints of the Trainer hold the masks too, so that
    ``train(resume_from_checkpoint=...)`` goes on with the same zeros.

    Attributes:
        options: what to prune, and when.
        output: a directory that gets the trained model with its zeros, as a checkpoint, and a
            report of them, ``sparsity.json``; None to write nothing.
        pruned: what was pruned, once training has ended.
    """

    def __init__(
        self,
        options: GradualPruning | Mapping[str, Any],
        output: str | Path | None = None,
    ) -> None:
        """Take the options; see the attributes.

        Raises:
            RecipeError: an option is of another type, or out of its range.
        """
        self.options = GradualPruning.of(options)
        self.output = None if output is None else Path(output)
        self.pruned: Pruned | None = None
        self.saved: Mapping[str, Any] | None = None
        self._pruner: GradualPruner | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer puts into its checkpoints."""
        saved = self.saved
        if self._pruner is not None:
            saved = to_text(self._pruner.state_dict(), self._pruner.module)
        output = None if self.output is None else str(self.output)
        arguments = {"options": self.options.to_json(), "output": output}
        return {"args": arguments, "attributes": {"saved": saved}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Choose the weights, and take up what a checkpoint holds.

        Raises:
            TrainingError: the model can't be pruned so, or the Trainer would undo it.
            EmitError: the output exists.
        """
        assert model is not None
        if self._pruner is not None:  # of a training that an error has ended
            self._pruner.remove()
        name, states = type(self).__name__, cast("dict[str, Any]", state.stateful_callbacks)
        before = states.get(name)
        _check_trainer(args, state, before, writes=self.output is not None)
        if self.output is not None:
            check_free(self.output)
        self.pruned = None
        pruner = GradualPruner(unwrap(model), self.options, optimizer)
        if state.global_step:
            saved = (before or {}).get("attributes", {}).get("saved")
            if saved is None:
                logger.warning(
                    "pruning begins at step %d: the checkpoint is of a training without it",
                    state.global_step,
                )
            else:
                pruner.load_state_dict(from_text(saved, pruner.module))
        self._pruner = pruner
        states[name] = self.state()  # where saving looks for an older one
        pruner.update(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune if it is time: after a step of the optimiser, and before anything is saved."""
        assert self._pruner is not None
        self._pruner.update(state.global_step, state.max_steps)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count the zeros, and write.

        Raises:
            TrainingError: a zero isn't one.
            EmitError: the output can't be written.
        """
        assert self._pruner is not None
        pruner, self._pruner = self._pruner, None
        first = state.is_world_process_zero
        self.pruned = finish(pruner, self.output, beside=processing_class, first=first)


def _check_trainer(
    args: TrainingArguments, state: TrainerState, before: Any, *, writes: bool
) -> None:
    """Refuse what would lose the zeros."""
    kind = getattr(args.distributed_state, "distributed_type", None)
    if args.deepspeed or getattr(kind, "value", None) == "DEEPSPEED":
        raise TrainingError(
            "a model in DeepSpeed can't be pruned while it trains",
            why="its optimiser keeps weights of its own, in which nothing is pruned",
            hint="shard with FSDP2 (fsdp_version: 2), or train with DDP",
        )
    if args.load_best_model_at_end:
        raise TrainingError(
            "pruning on a schedule doesn't go with load_best_model_at_end",
            why="the best checkpoint may be one of before the last weights were pruned",
            hint="leave it off: the model in the end is the one that has all zeros",
        )
    if isinstance(before, list):
        raise TrainingError(
            "one Trainer takes one PruningCallback",
            hint="choose weights with include and exclude, or prune the rest with another Trainer",
        )
    if writes and state.is_hyper_param_search:
        raise TrainingError(
            "the trials of a search would all write the same output",
            hint="search without output, and train once more with it",
        )
