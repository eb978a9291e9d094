"""What became of single weights and of refitted layers, as the report has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphprune.passes.repair.refitted import Refitted

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Refits:
    """Layers that were fitted anew for what their structures lost.

    Attributes:
        method: obs, reconstruct or bias: what gave them the weights that they have.
        layers: one entry per layer, by its name in the dense model.
        places: ONNX format to parameter of the slim model to where its file has it; see
            `graphprune.emit.written.Found`.
    """

    method: str
    layers: tuple[Refitted, ...]
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def parameters(self) -> tuple[str, ...]:
        """All that was changed, by the names of the dense model."""
        biases = tuple(e.bias for e in self.layers if e.bias is not None)
        return (*(e.parameter for e in self.layers), *biases)

    def described(self) -> str:
        """One line."""
        count = len(self.layers)
        before = sum(e.before for e in self.layers) / count
        after = sum(e.error for e in self.layers) / count
        return (
            f"refitted {count} layers by {self.method}: mean relative error of their outputs "
            f"{before:.4f}, now {after:.4f}"
        )


@dataclass(frozen=True)
class MaskedLayer:
    """One parameter, in the names and shapes of the written model.

    Attributes:
        parameter: its name.
        shape: its shape.
        target: fraction of the weights that was to go.
        sparsity: fraction that the mask removes; None after a dry run, like all that follows.
        zeros: weights that are zero as they are stored: rounding may add some.
        error: relative error of the layer's output on the calibration data.
        notes: what was unusual.
    """

    parameter: str
    shape: tuple[int, ...]
    target: float | None
    sparsity: float | None = None
    zeros: int | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """How many it has."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Masks:
    """Which single weights are zero.

    Attributes:
        method: how they were chosen.
        asked: the sparsity or the pattern, and the layer budget.
        layers: one entry per treated parameter, in the order of treatment.
        skipped: every other matrix to the reason why it was left alone.
        sparsity: fraction of the treated parameters that masks remove; None after a dry run.
        sparsity_of_model: the same weights as a fraction of the whole model, embeddings included.
        bits: width that the kept weights are rounded to; None where they aren't. They are stored
            as the values that they are rounded to, in the dtype of the model.
        samples: what they were calibrated on; None where no data was looked at.
        checked: format to the number of zeros found in the treated weights of what was written.
        places: ONNX format to parameter to where its file has it; see
            `graphprune.emit.written.Found`.
        reordered: further parameters that have another order of channels.
    """

    method: str
    asked: str
    layers: tuple[MaskedLayer, ...]
    skipped: Mapping[str, str]
    sparsity: float | None = None
    sparsity_of_model: float | None = None
    bits: int | None = None
    samples: str | None = None
    checked: Mapping[str, int] | None = None
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    reordered: tuple[str, ...] = ()

    def render(self) -> RenderableType:
        """Returns the table of layers with the totals, for a rich console."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("weights that become zero" if self.sparsity is None else "masked", "shape"):
            table.add_column(title, overflow="fold")
        numbers = ["asked"] if self.sparsity is None else ["asked", "zero", "error"]
        for title in numbers:
            table.add_column(title, justify="right")
        table.add_column("")
        for layer in self.layers:
            cells = [_percent(layer.target)]
            if self.sparsity is not None:
                error = "-" if layer.error is None else f"{layer.error:.2e}"
                cells += [_percent(layer.sparsity), error]
            shape = " x ".join(str(size) for size in layer.shape)
            notes = Text("; ".join(layer.notes))
            table.add_row(Text(layer.parameter), shape, *cells, notes)
        return Group(table, *(Text(line) for line in self._lines()))

    def _lines(self) -> list[str]:
        lines = [f"{self.method}: {self.asked}"]
        weights = sum(layer.weights for layer in self.layers)
        if self.sparsity is None or self.sparsity_of_model is None:
            lines.append(f"to be treated: {len(self.layers)} parameters, {weights:,} weights")
        else:
            lines.append(
                f"zero: {_percent(self.sparsity)} of the {weights:,} weights of these layers, "
                f"{_percent(self.sparsity_of_model)} of the whole model"
            )
        if self.samples is not None:
            lines.append(f"calibrated on {self.samples}")
        if self.bits is not None:
            lines.append(
                f"kept weights are rounded to {self.bits} bits, and stored as the values they are "
                "rounded to, in the dtype of the model"
            )
        lines += [f"left alone: {line}" for line in by_reason(self.skipped)]
        for form, zeros in (self.checked or {}).items():
            lines.append(f"counted in {form}: {zeros:,} zeros, all of them")
        return lines


def by_reason(skipped: Mapping[str, str], shown: int = 3) -> list[str]:
    """Parameters that were left alone, a line for each reason; of many the first few by name."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        lines.append(f"{', '.join(names[:shown])}{more}: {reason}")
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
