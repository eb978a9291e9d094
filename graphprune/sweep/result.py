"""What a sweep found, as data: a point for each setting, and what is suggested."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphprune._version import __version__
from graphprune.quality.measures import Measures
from graphprune.quality.result import Quality
from graphprune.report.report import speedups

VERSION = 1

COLUMNS = ("size", "series", "parameters", "parameters_kept", "macs", "macs_kept", "bytes",
           "zeros", "weights_kept",
           "perplexity", "perplexity_ratio", "ratio_low", "ratio_high", "agreement", "kl",
           "speedup", "error")  # fmt: skip
"""Of the CSV file. Quality is that of the text on which the point does worst."""


@dataclass(frozen=True)
class Point:
    """One setting, made and measured.

    Attributes:
        label: all of it in words.
        size: what goes.
        series: by what.
        after: of the slim model.
        quality: beside the dense one; None where nothing could be measured.
        kept: by role, units kept and units there were.
        error: mean relative error of refitted layers; None where none were.
        zeros: fraction of the parameters that masks make zero; None without masks.
        max_abs_error: of the proof: the largest difference between slim and masked model.
        shared: whether it was made on statistics of the dense model, with the others.
        recipe: with nothing left open, as YAML.
        notes: what there is to say.
    """

    label: str
    size: str
    series: str
    after: Measures
    quality: Quality | None = None
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    error: float | None = None
    zeros: float | None = None
    max_abs_error: float | None = None
    shared: bool = False
    recipe: str = ""
    notes: tuple[str, ...] = ()

    def row(self, before: Measures) -> dict[str, Any]:
        """The point in one row; see `COLUMNS`."""
        texts = dict(self.quality.texts) if self.quality is not None else {}
        worst = max(texts, key=lambda name: texts[name].ratio.value, default=None)
        found: dict[str, Any] = {"label": self.label, "size": self.size, "series": self.series}
        for name in ("parameters", "macs"):
            value, dense = getattr(self.after, name), getattr(before, name)
            found |= {name: value, f"{name}_kept": value / dense if value and dense else None}
        found |= {"bytes": self.after.bytes, "zeros": self.zeros}
        left = found["parameters_kept"]
        found["weights_kept"] = left and left * (1 - (self.zeros or 0.0))
        if worst is not None:
            one = texts[worst]
            found |= {
                "perplexity": self.after.perplexities[worst].value,
                "perplexity_ratio": one.ratio.value,
                "ratio_low": one.ratio.low,
                "ratio_high": one.ratio.high,
                "agreement": min((t.agreement.value for t in texts.values() if t.agreement),
                                 default=None),
                "kl": max((t.kl.value for t in texts.values() if t.kl), default=None),
            }  # fmt: skip
        faster = speedups(before, self.after)
        found["speedup"] = next((one["time"] for one in faster.values()), None)
        found["error"] = self.error
        return {"label": self.label, **{name: found.get(name) for name in COLUMNS}}


@dataclass(frozen=True)
class Cell:
    """What one structure alone costs.

    Attributes:
        structure: its name.
        role: its role.
        layer: where it stands: "12"; "" outside of layers.
        removed: fraction of its units that went.
        change: of a language model by how much its perplexity rises, as a fraction; of others the
            squared change of the outputs, in parts of their energy.
        kl: mean divergence of the predictions, in nats; None for what is no language model.
    """

    structure: str
    role: str
    layer: str
    removed: float
    change: float
    kl: float | None = None


@dataclass(frozen=True)
class Suggestion:
    """Which point to take.

    Attributes:
        label: the point's; None where none may be taken.
        reason: why, in a sentence.
        recipe: the point's recipe.
    """

    label: str | None
    reason: str
    recipe: str = ""


@dataclass(frozen=True)
class Sweep:
    """The result of `graphprune.sweep.sweep.sweep`.

    Attributes:
        source: the model, as it was given.
        before: of the dense model.
        points: in the order in which they were asked for.
        suggestion: which one to take.
        sensitivity: structure by structure, of the smallest point; empty where nobody asked.
        notes: what there is to say of all.
        seconds: by stage.
        command: the command line; None for a call from Python.
    """

    source: str
    before: Measures
    points: tuple[Point, ...]
    suggestion: Suggestion
    sensitivity: tuple[Cell, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    command: str | None = None

    def as_data(self) -> dict[str, Any]:
        """Everything as plain data."""
        points = [
            {**asdict(one), "after": one.after.as_data(), "row": one.row(self.before)}
            for one in self.points
        ]
        return {
            "sweep": VERSION,
            "graphprune": __version__,
            "source": self.source,
            "before": self.before.as_data(),
            "points": points,
            "suggestion": asdict(self.suggestion),
            "sensitivity": [asdict(one) for one in self.sensitivity],
            "notes": list(self.notes),
            "run": {"command": self.command, "seconds": dict(self.seconds)},
        }

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(self.as_data(), indent=2) + "\n"

    def to_csv(self) -> str:
        """A line for each point."""
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(one.row(self.before) for one in self.points)
        return out.getvalue()
