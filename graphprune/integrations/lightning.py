"""A Lightning callback that prunes on a schedule, and writes in the end.

Lightning comes as `lightning.pytorch` and as `pytorch_lightning`, which don't know each other's
classes. The callback is one of whichever has been imported before, or is installed.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import LoadError, TrainingError
from graphprune.frontends.tracing.trace import unwrap
from graphprune.integrations.sparse_output import check_free, finish
from graphprune.training import GradualPruner, GradualPruning, Pruned

logger = logging.getLogger(__name__)

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_REFUSED = ("FSDPStrategy", "DeepSpeedStrategy")


def _bases() -> tuple[Any, ...]:
    """The classes of callbacks of the Lightnings in use, or else of the first that is installed."""
    if used := [sys.modules[name] for name in _PACKAGES if name in sys.modules]:
        return tuple(module.Callback for module in used)
    errors = []
    for name in _PACKAGES:
        try:
            return (importlib.import_module(name).Callback,)
        except ImportError as error:
            errors.append(str(error))
    raise LoadError(
        "Lightning can't be imported",
        why="; ".join(errors),
        hint="pip install 'graphprune[lightning]'",
    )


class PruningCallback(*_bases()):  # type: ignore[misc]  # which one is known only here
    """Prunes a module while Lightning trains it.

        callback = PruningCallback(GradualPruning(sparsity=0.6), output="sparse")
        Trainer(max_epochs=3, callbacks=[callback]).fit(module, batches)

    Steps are those of the optimiser, however many micro-batches each has; under manual optimisation
    every batch is a step. Checkpoints of Lightning hold the masks too, so that
    ``fit(ckpt_path=...)`` goes on with the same zeros.

    Attributes:
        options: what to prune, and when; names of parameters are those of the module at `path`.
        output: a directory that gets the trained weights with their zeros, and a report of them,
            ``sparsity.json``: a checkpoint for a model of transformers, ``model.safetensors`` for
            others. None to write nothing.
        path: of the module in the LightningModule that is pruned and written, such as "model";
            empty for all of it.
        steps: of the whole training; None for what the trainer says.
        pruned: what was pruned, once training has ended.
    """

    def __init__(
        self,
        options: GradualPruning | Mapping[str, Any],
        output: str | Path | None = None,
        *,
        path: str = "",
        steps: int | None = None,
    ) -> None:
        """Take the options; see the attributes.

        Raises:
            RecipeError: an option is of another type, or out of its range.
        """
        super().__init__()
        self.options = GradualPruning.of(options)
        self.output = None if output is None else Path(output)
        self.path = path
        self.steps = steps
        self.pruned: Pruned | None = None
        self._pruner: GradualPruner | None = None
        self._loaded: Mapping[str, Any] = {}
        self._total = 0
        self._done = 0
        self._stepped = 0

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into its checkpoints."""
        if self._pruner is None:
            return dict(self._loaded)
        return {"done": self._done, "pruner": self._pruner.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep what a checkpoint holds until training begins."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Choose the weights, and take up what a checkpoint holds.

        Raises:
            TrainingError: the module can't be pruned so, or nobody knows how long it trains.
            EmitError: the output exists.
        """
        self._release()
        _check_trainer(trainer)
        if self.output is not None:
            check_free(self.output)
        self.pruned = None
        self._total = self._count(trainer)
        self._done, self._stepped = 0, trainer.global_step
        pruner = GradualPruner(unwrap(pl_module.get_submodule(self.path)), self.options)
        self._pruner = pruner
        if trainer.global_step and "pruner" in self._loaded:
            pruner.load_state_dict(self._loaded["pruner"])
            self._done = self._loaded["done"]
        elif trainer.global_step:
            self._done = trainer.global_step
            logger.warning(
                "pruning begins at step %d: the checkpoint is of a training without it", self._done
            )
        self._loaded = {}
        pruner.update(self._done, self._total)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Leave what is pruned out of the norm by which gradients are clipped."""
        assert self._pruner is not None
        self._pruner.clear_gradients()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune if it is time: after a step of the optimiser, and before anything is saved."""
        assert self._pruner is not None
        stepped = trainer.global_step > self._stepped
        self._stepped = trainer.global_step
        if stepped or not pl_module.automatic_optimization:
            self._done += 1
            self._pruner.update(self._done, self._total)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Count the zeros, and write.

        Raises:
            TrainingError: a zero isn't one.
            EmitError: the output can't be written.
        """
        assert self._pruner is not None
        pruner, self._pruner = self._pruner, None
        self.pruned = finish(pruner, self.output, first=trainer.is_global_zero)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the weights of a training go that an error has ended."""
        self._release()

    def _release(self) -> None:
        if self._pruner is not None:
            self._pruner.remove()
            self._pruner = None

    def _count(self, trainer: Any) -> int:
        """Steps of the whole training."""
        found = self.steps if self.steps is not None else trainer.estimated_stepping_batches
        if found == float("inf"):
            raise TrainingError(
                "nobody knows how many steps the training has",
                why="neither max_steps nor max_epochs of a known length is given",
                hint="tell the trainer max_steps, or the callback steps",
            )
        return int(found)


def _check_trainer(trainer: Any) -> None:
    """Refuse what would lose the zeros."""
    strategy = type(trainer.strategy).__name__
    if strategy in _REFUSED:
        raise TrainingError(
            "zeros can't be held under this strategy",
            where=strategy,
            why="it flattens weights, or its optimiser keeps some of its own",
            hint="take ddp, or ModelParallelStrategy with fully_shard",
        )
