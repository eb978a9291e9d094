"""The rows of docs/results.md on calibration data: what a model keeps of several kinds of text.

Four texts are measured on, twelve windows of 512 tokens each, evenly spaced: WikiText-2,
tinyshakespeare, every other topic of CPython's help, and modules of the standard library. None of
them is calibrated on: `help` as calibration is the other topics, `wikitext` the validation text.
"""

from __future__ import annotations

import json
import math
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _results_rows import Row

if TYPE_CHECKING:
    import torch

DATA = "data"
TITLES = (
    "removed", "calibrated on", "WikiText-2", "plays", "help", "code", "mean", "parameters"
)  # fmt: skip
TEXT = (
    "Perplexity over that of the dense model ({dense}), on twelve windows of 512 tokens of four "
    "texts: WikiText-2's test text, tinyshakespeare, every other topic of CPython's help, "
    "and fifteen modules of its standard library; *mean* is geometric. Units are chosen by `obs` "
    "with its own refits; *+ reconstruct* fits to the dense model once more. Calibration is on so "
    "many windows of 512 tokens: *help* is the other topics, *wikitext* the validation text, "
    "*self* what the model writes."
)
WINDOWS, LENGTH = 12, 512
NAMES = ("wikitext", "plays", "help", "code")

GOALS: Mapping[str, Mapping[str, Any]] = {
    "ffn -25 %": {"remove": {"ffn": 0.25}},
    "params 0.7": {"target": {"params": 0.7}},
}
SOURCES = (
    "64 help",
    "64 builtin",
    "64 self",
    "32 builtin + 32 self",
    "32 builtin + 32 self + reconstruct",
    "64 builtin + 64 self",
    "64 wikitext",
    "58 wikitext + 35 builtin + 35 self",
    "51 wikitext + 38 builtin + 39 self",
)
BUDGETED = ("64 builtin", "64 self", "32 builtin + 32 self", "64 builtin + 64 self")
"""What a budget, which takes twice as much, is measured with."""

_MODULES = (
    "argparse", "ast", "asyncio/tasks", "calendar", "configparser", "csv", "dataclasses", "decimal",
    "difflib", "email/message", "fractions", "ftplib", "heapq", "http/client", "inspect",
)  # fmt: skip


def data_rows() -> list[Row]:
    """The dense model, then every source of calibration for every goal."""
    rows = [Row(DATA, "", "dense")]
    for goal, what in GOALS.items():
        sources = BUDGETED if "target" in what else SOURCES
        rows += [Row(DATA, goal, source) for source in sources]
    return rows


def data_lines(rows: list[Row], found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line of the table for every row that was measured."""
    lines = []
    for row in rows:
        facts = found.get(row.key)
        if facts is not None and row.target:
            ratios = [facts["ratios"][name] for name in NAMES]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            shown = (*(f"{ratio:.2f}" for ratio in ratios), f"{mean:.2f}")
            lines.append((row.target, row.method, *shown, f"{facts['parameters'] / 1e6:.1f} M"))
    return lines


def data_text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands above the table."""
    dense = found.get(f"{DATA}//dense", {}).get("perplexities", {})
    shown = " / ".join(f"{dense[name]:.1f}" for name in NAMES if name in dense)
    return TEXT.format(dense=shown)


@dataclass
class Domains:
    """The model and the texts.

    Attributes:
        model: checkpoint directory.
        data: directory with wikitext-2/ and tinyshakespeare.txt.
    """

    model: Path
    data: Path

    def measure(self, row: Row) -> dict[str, Any]:
        """Compute a row."""
        if not row.target:
            return {"perplexities": self.dense}
        from graphprune import apply
        from graphprune.passes.repair import structured
        from graphprune.passes.selection.select import select
        from graphprune.quality.perplexity import parameters

        start = time.process_time()
        windows = self._calibration(row.method.removesuffix(" + reconstruct"))
        plan = select(self.program, **GOALS[row.target], score="random")
        keep = {name: len(units) for name, units in plan.kept_units.items()}
        found = structured.obs(self.program, windows, keep)
        if row.method.endswith("reconstruct"):
            found = structured.reconstruct(self.program, windows, found.plan)
        seconds = round(time.process_time() - start, 1)
        slim = apply(found.program, found.plan).module
        ratios = {name: value / self.dense[name] for name, value in self._perplexities(slim)}
        return {"ratios": ratios, "parameters": parameters(slim), "seconds": seconds}

    @cached_property
    def program(self) -> Any:
        """The traced dense model."""
        import graphprune

        return graphprune.load(self.model)

    @cached_property
    def dense(self) -> dict[str, float]:
        """Perplexities of the dense model."""
        return dict(self._perplexities(self.program.module))

    def _perplexities(self, module: Any) -> list[tuple[str, float]]:
        from graphprune.quality.perplexity import perplexity

        return [(name, perplexity(module, found).value) for name, found in self.windows.items()]

    @cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        """What is measured on, by the name of the text."""
        import torch

        folder = Path(sysconfig.get_paths()["stdlib"])
        texts = {
            "wikitext": (self.data / "wikitext-2" / "test.txt").read_text(encoding="utf-8"),
            "plays": (self.data / "tinyshakespeare.txt").read_text(encoding="utf-8"),
            "help": _topics(0),
            "code": "\n\n".join(
                (folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES
            ),
        }
        found = {name: self._cut(text) for name, text in texts.items()}
        return {
            name: cut[torch.linspace(0, len(cut) - 1, WINDOWS).long()]
            for name, cut in found.items()
        }

    def _calibration(self, sources: str) -> torch.Tensor:
        import torch

        from graphprune.calibration.generated import generate_windows
        from graphprune.calibration.text.order import alternate
        from graphprune.calibration.text.read import read_text

        parts = []
        for part in sources.split(" + "):
            count, name = part.split()
            if name == "self":
                parts.append(generate_windows(self.program, int(count), LENGTH, 0))
                continue
            texts = {
                "help": lambda: _topics(1),
                "builtin": lambda: read_text("builtin"),
                "wikitext": lambda: (self.data / "wikitext-2" / "valid.txt").read_text(),
            }
            cut = self._cut(texts[name]())
            order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))
            parts.append(cut[order[: int(count)]])
        return torch.cat(parts)[alternate([len(part) for part in parts], 0)]

    def _cut(self, text: str) -> torch.Tensor:
        from graphprune.calibration.text.read import load_tokenizer, windows

        return windows(load_tokenizer(self.model), text, length=LENGTH)


def _topics(first: int) -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[first::2])


def shown(facts: Mapping[str, Any]) -> str:
    """A measured row, for the log."""
    return json.dumps(facts.get("ratios", facts.get("perplexities")))
