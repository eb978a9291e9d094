"""What became of weights that were trained, as the report has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
