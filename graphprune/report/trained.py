"""What became of weights that were trained, as the report has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # reports are read where torch isn't wanted
    from graphprune.training import Recovered


@dataclass(frozen=True)
class Trained:
    """Weights that a pass has trained.

    Attributes:
        method: the name of the pass.
        parameters: what was trained, by the names of the dense model.
        told: one line for people.
        figures: what was counted: tokens, steps, losses, or the errors of each block.
        samples: what was trained on.
        places: ONNX format to parameter of the slim model to where its file has it; see
            `graphprune.emit.written.Found`.
    """

    method: str
    parameters: tuple[str, ...]
    told: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    samples: str | None = None
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        method: str,
        parameters: tuple[str, ...],
        run: Recovered,
        samples: str,
        *,
        doing: str,
        meanwhile: str = "",
        figures: Mapping[str, Any],
    ) -> Self:
        """What a training has done, of at least one step.

        Args:
            method: see `Trained`.
            parameters: see `Trained`.
            run: of the training.
            samples: see `Trained`.
            doing: what it has done: "trained adapters".
            meanwhile: what happened in its steps.
            figures: what else was counted.
        """
        tenth = max(1, run.steps // 10)
        first, last = (sum(part) / tenth for part in (run.losses[:tenth], run.losses[-tenth:]))
        told = (
            f"{doing} on {run.tokens:,} tokens in {run.steps:,} steps{meanwhile}: mean loss of the "
            f"first tenth {first:.4f}, of the last {last:.4f}"
        )
        counted = {"tokens": run.tokens, "steps": run.steps, "losses": list(run.losses)}
        return cls(method, parameters, told, {**counted, **figures}, samples)
