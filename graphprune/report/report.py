"""What a compilation did: the dense and the slim model side by side, and how they were measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from graphprune.quality.measures import Measures
from graphprune.quality.table import quality_table
from graphprune.quality.timing import Speedup, in_words, speedup
from graphprune.report.control import Control, control_table
from graphprune.report.forecast import Forecast
from graphprune.report.kept import Kept
from graphprune.report.masks import Masks, Refits
from graphprune.report.provenance import Provenance, varying_apart
from graphprune.report.trained import Trained

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphprune.quality.result import Quality

_LONG = 40  # characters of an input that fit in the first column of a table


@dataclass(frozen=True)
class Report:
    """The result of :func:`graphprune.compile`.

    Attributes:
        source: What was compiled: a path, a hub id, or a class name.
        before: Of the dense model.
        after: Of the slim model.
        score: What the units were ranked by; None where a saved plan was replayed.
        kept: By role, units kept and units there were, over all structures.
        structures: Of every structure that loses units, how many stay.
        outputs: Paths written; empty after a dry run.
        native: Whether a plain Hugging Face config can hold the plan; None if nobody asked.
        max_abs_error: Largest difference between the slim and the masked model; None if dry.
        verified_in: dtype of that comparison.
        notes: What the reader should know and no number says.
        seconds: Time by stage.
        weights: The file that the weights of a factory's module came from.
        masks: Which single weights are zero; None where that wasn't asked for.
        refits: Layers that were fitted anew; None where none were.
        trained: What training has done, by pass.
        quality: How near the slim model is to the dense one; None where it isn't measured.
        controls: What a trained model is compared with, where the recipe asks for it.
        provenance: How the output was made; None after a dry run.
        forecast: What the real run would do; None after one.
        passes: What was done, pass by pass: ``name``, ``options`` that aren't as by default,
            ``round`` where there are several, and ``notes``.
        recipe: With nothing left open, as YAML; None after a dry run.
        sweep: What the sweep found that the recipe comes from: a row for each of its points, and
            which one was suggested. None where it comes from none.
    """

    source: str
    before: Measures
    after: Measures
    kept: dict[str, tuple[int, int]]
    score: str | None = None
    outputs: tuple[str, ...] = ()
    native: bool | None = None
    max_abs_error: float | None = None
    verified_in: str | None = None
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    weights: str | None = None
    masks: Masks | None = None
    refits: Refits | None = None
    trained: tuple[Trained, ...] = ()
    quality: Quality | None = None
    controls: tuple[Control, ...] = ()
    provenance: Provenance | None = None
    forecast: Forecast | None = None
    passes: tuple[dict[str, Any], ...] = ()
    structures: tuple[Kept, ...] = ()
    recipe: str | None = None
    sweep: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Renders everything as JSON; what varies from run to run is under ``run``."""
        sides = {"before": self.before.as_data(), "after": self.after.as_data()}
        data = asdict(self) | sides | {"speedup": speedups(self.before, self.after)}
        return json.dumps(varying_apart(data), indent=2) + "\n"

    def render(self) -> RenderableType:
        """Returns the before/after table with its conditions, for a rich console."""
        from rich.console import Group
        from rich.text import Text

        parts = [f"{role} {kept:,} of {size:,}" for role, (kept, size) in self.kept.items()]
        lines = ["kept: " + (", ".join(parts) or "everything")]
        if self.score is not None:
            lines.append(f"scored by {self.score}")
        if self.refits is not None:
            lines.append(self.refits.described())
        lines += [one.told for one in self.trained]
        if self.max_abs_error is not None:
            lines.append(
                "verified: outputs match the masked model within "
                f"{self.max_abs_error:.1e} ({self.verified_in})"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"written: {path}" for path in self.outputs]
        masks = [] if self.masks is None else [self.masks.render()]
        table = comparison(self.before, self.after)
        quality = quality_table(self.before, self.after, self.quality)
        quality += control_table(self.before, self.after, self.controls)
        ahead = [] if self.forecast is None else [self.forecast.render()]
        return Group(*masks, table, *quality, *ahead, *(Text(line) for line in lines))


def speedups(before: Measures, after: Measures) -> dict[str, dict[str, float]]:
    """Returns time ratio, MACs ratio and share of the ideal speed-up, by runtime."""
    return {name: asdict(one) for name, one in _speedups(before, after).items()}


def _speedups(before: Measures, after: Measures) -> dict[str, Speedup]:
    """Returns the speed-up by runtime; none where the models were timed with other inputs."""
    if before.input != after.input:
        return {}
    found = {
        name: speedup(getattr(before, name), getattr(after, name))
        for name in ("torch", "onnxruntime")
    }
    return {name: one for name, one in found.items() if one is not None}


def comparison(
    before: Measures, after: Measures | None, titles: tuple[str, str] = ("dense", "slim")
) -> RenderableType:
    """Returns a table of one or two models: a row for each number taken, then the conditions."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in (*titles, "change") if after else titles[:1]:
        table.add_column(title, justify="right", overflow="fold")
    for label, first, second in _rows(before, after):
        cells = [_number(first), _number(second), _change(first, second)]
        table.add_row(label, *(cells if after else cells[:1]))
    return Group(table, *(Text(line) for line in _conditions(before, after)))


def _rows(before: Measures, after: Measures | None) -> list[tuple[str, float | None, float | None]]:
    """Returns (label, before, after) for each number that was taken of either model."""
    labels = {
        "parameters": "parameters",
        f"MACs{_of_input(before, after)}": "macs",
        "weights, bytes": "bytes",
        "files, bytes": "files",
        "PyTorch, ms": "torch.milliseconds",
        "ONNX Runtime, ms": "onnxruntime.milliseconds",
    }
    rows = [(label, _get(before, path), _get(after, path)) for label, path in labels.items()]
    return [row for row in rows if row[1:] != (None, None)]


def _of_input(before: Measures, after: Measures | None) -> str:
    """Returns the input that both models' numbers are of, in brackets; "" where it is too long."""
    inputs = {side.input for side in (before, after) if side and side.input}
    return f" ({text})" if len(inputs) == 1 and len(text := inputs.pop()) <= _LONG else ""


def _get(measures: Measures | None, path: str) -> float | None:
    value: Any = measures
    for name in path.split("."):
        value = getattr(value, name, None)
    return cast("float | None", value)


def _conditions(before: Measures, after: Measures | None) -> list[str]:
    """Says how the numbers were taken, and which of them mean nothing."""
    sides = [side for side in (before, after) if side]
    lines = []
    if taken := [
        latency for side in sides for latency in (side.torch, side.onnxruntime) if latency
    ]:
        repeats, threads = min(one.repeats for one in taken), max(one.threads for one in taken)
        both = all(s.torch for s in sides) or all(s.onnxruntime for s in sides)
        turns = " in turns" if after and both else ""
        plural = "s" if threads > 1 else ""
        lines.append(
            f"latency{_of_input(before, after)}: median of {repeats} calls or more{turns}, "
            f"{threads} thread{plural}"
        )
    lines += _ideal(before, after)
    for shapes in {str(side.inputs): side.inputs for side in sides if side.inputs}.values():
        lines.append("inputs: " + ", ".join(f"{n} {list(s)}" for n, s in shapes.items()))
    lines += [f"note: {note}" for side in sides for note in side.notes]
    return lines


def _ideal(before: Measures, after: Measures | None) -> list[str]:
    """Says how much faster the second model is, and how much that is of what MACs allow."""
    if after is None:
        return []
    names = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}
    lines = []
    for name, one in _speedups(before, after).items():
        ideal = f" ({one.share:.0%} of the ideal speed-up)" if one.macs > 1 else ""
        if one.macs != 1:  # nothing was to become faster
            lines.append(f"{names[name]}: {in_words(one)}{ideal}")
    if before.input != after.input and before.input and after.input:
        lines.append(f"no ratio: the models were timed with {before.input} and {after.input}")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if value < 1e7 else f"{value:.2e}"


def _change(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return ""
    ratio = after / before
    return f"{(ratio - 1) * 100:+.1f} %" if ratio < 10 else f"x {ratio:.3g}"
