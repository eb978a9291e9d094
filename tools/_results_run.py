"""Computing the rows of docs/results.md for the language model.

All on one protocol: raw text, tokenised once without special tokens, non-overlapping windows of
512; the first 64 of the validation text to calibrate on, the first 64 of the test text to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results_rows import DEPTH, MASKED, SEARCHED, STRIPS, WIDTH, WIDTHS, Row

WINDOWS, LENGTH = 64, 512


@dataclass
class Bench:
    """A model with its texts.

    Attributes:
        folder: gives the checkpoint directory.
        texts: directory with valid.txt and test.txt.
    """

    folder: Callable[[], Path]
    texts: Path
    scores: dict[str, Any] = field(default_factory=dict)
    chosen: dict[tuple[str, str], Any] = field(default_factory=dict)

    def measure(self, row: Row) -> dict[str, Any]:
        """Compute a row."""
        start = time.process_time()
        if row.table == MASKED:
            model, facts = self._masked(row)
        elif row.table == WIDTH:
            model, facts = self._narrow(row)
        elif row.table == DEPTH:
            model, facts = self._shallow(row)
        else:
            model, facts = self._written(self.program, {}), {}
        facts["seconds"] = round(time.process_time() - start, 1)
        from graphprune.quality.perplexity import parameters, perplexity

        start = time.process_time()
        found = perplexity(model, self.test)
        facts["perplexity"], facts["losses"] = found.value, kept_losses(found.losses)
        facts["pass_seconds"] = round(time.process_time() - start, 1)
        facts["parameters"] = parameters(model)
        return facts

    @cached_property
    def model(self) -> Path:
        """Checkpoint directory."""
        return self.folder()

    @cached_property
    def program(self) -> Any:
        """The traced dense model."""
        import graphprune

        return graphprune.load(self.model)

    @cached_property
    def calibration(self) -> torch.Tensor:
        """Token windows to calibrate on."""
        return self._windows("valid")

    @cached_property
    def test(self) -> torch.Tensor:
        """Token windows to measure on."""
        return self._windows("test")

    def _windows(self, split: str) -> torch.Tensor:
        from graphprune.calibration.text.read import load_tokenizer, read_text, windows

        text = read_text(self.texts / f"{split}.txt")
        return windows(load_tokenizer(self.model), text, length=LENGTH, count=WINDOWS)

    def _masked(self, row: Row) -> tuple[Any, dict[str, Any]]:
        import graphprune
        from graphprune import solvers
        from graphprune.passes.masks import method

        settings = {n: row.options[n] for n in ("permute",) if n in row.options}
        solver = method(row.options["solver"], settings)
        target = row.options["pattern"]
        if ":" in target:
            kept, of = map(int, target.split(":"))
            pattern: Any = solvers.NM(kept, of)
        elif target == STRIPS:
            pattern = solvers.strips(0.5)
        else:
            pattern = solvers.Unstructured(float(target.removesuffix(" %")) / 100)
        more = {n: row.options[n] for n in ("budget", "reference") if n in row.options}
        blind = row.options["solver"] == "magnitude" and not more
        data = self.calibration[:1] if blind else self.calibration
        found = graphprune.sparsify(self.program, data, solver, pattern, **more)
        errors = [e.error for e in found.layers if e.error is not None]
        facts = {
            "sparsity": found.sparsity,
            "sparsity_of_model": found.sparsity_of_model,
            "error": sum(errors) / len(errors) if errors else None,
        }
        return self._written(found.program, {}), facts

    def _narrow(self, row: Row) -> tuple[Any, dict[str, Any]]:
        from graphprune.frontends.hf.biases import with_biases
        from graphprune.passes.repair import structured

        program, plan = self._chosen(row)
        repair = row.options["repair"]
        if repair == "reconstruct":
            program = structured.reconstruct(self.program, self.calibration, plan).program
        elif repair == "bias":
            program = with_biases(self.program, structured.read_by(self.program, plan))
            plan = replace(plan, fingerprint=program.fingerprint)
            program = structured.compensate(program, self.calibration, plan).program
        return self._written(program, plan.kept_units), {}

    def _chosen(self, row: Row) -> tuple[Any, Any]:
        """The program whose weights a plan goes with, and the plan."""
        from graphprune.passes.repair import structured
        from graphprune.passes.selection.select import select

        goal, score = WIDTHS[row.target], row.options["score"]
        if (row.target, score) in self.chosen:
            return self.chosen[row.target, score]
        if score == "obs":
            counts = select(self.program, **goal, score="random")
            keep = {n: _count(units) for n, units in counts.kept_units.items()}
            found = structured.obs(self.program, self.calibration, keep)
            result = found.program, found.plan
        else:
            scorer, data = self._score(score), self.calibration
            result = self.program, select(self.program, **goal, score=scorer, calibration=data)
        self.chosen = {(row.target, score): result}  # the next row is about the same
        return result

    def _shallow(self, row: Row) -> tuple[Any, dict[str, Any]]:
        from graphprune.passes.repair.structured import reconstruct
        from graphprune.passes.selection.select import select

        layers = max(len(s.blocks) for s in self.program.structures)
        key = row.target, row.options["score"]
        plan = self.chosen.get(key) or select(
            self.program,
            shape={"layers": layers - row.options["count"]},
            score=self._order(row.options["score"]),
            calibration=self.calibration,
        )
        self.chosen = {key: plan}
        program = self.program
        if "repair" in row.options:
            program = reconstruct(program, self.calibration, plan).program
        (kept,) = plan.kept_units.values()
        gone = sorted(set(range(layers)) - {int(i) for i in kept})  # type: ignore[call-overload]
        return self._written(program, plan.kept_units), {"removed": gone}

    def _order(self, name: str) -> Any:
        """How layers are chosen; a search that goes on where the last row's has ended."""
        if name != "loss-greedy":
            return name
        if name not in self.scores:
            from graphprune.passes.scores.loss_greedy import LossGreedy

            self.scores[name] = Continued(LossGreedy(windows=SEARCHED), {})
        return self.scores[name]

    def _written(self, program: Any, kept: Any) -> Any:
        import graphprune

        plan = graphprune.Plan(program.fingerprint, kept)
        return graphprune.apply(program, plan).module

    def _score(self, name: str) -> Any:
        from graphprune.passes.scores import get_score

        if name not in self.scores:
            self.scores[name] = Remembered(get_score(name), {})
        return self.scores[name]


@dataclass(frozen=True)
class Remembered:
    """A score that is computed once for all structures of a kind, whatever the target."""

    score_: Any
    known: dict[str, Any]

    def score(self, program: Any, structures: Sequence[Any], inputs: Any) -> dict[str, Any]:
        """See `graphprune.passes.shared.score.Score`."""
        if any(s.name not in self.known for s in structures):
            roles = ("ffn", "kv_heads")
            every = [s for s in program.structures if s.prunable and s.role in roles]
            self.known.update(self.score_.score(program, every, inputs))
        return {s.name: self.known[s.name] for s in structures}


@dataclass(frozen=True)
class Continued:
    """A search for layers, one for all numbers of layers that go."""

    search: Any
    known: dict[str, Any]

    def score(self, program: Any, structures: Sequence[Any], inputs: Any) -> dict[str, Any]:
        """See `graphprune.passes.shared.score.Score`: only sets are asked for."""
        return {s.name: np.zeros((1, s.size)) for s in structures}

    def choose(self, program: Any, structure: Any, removable: Any, inputs: Any) -> Any:
        """See `graphprune.passes.shared.choice.Chooser`."""
        if structure.name not in self.known:
            found = self.search.choose(program, structure, removable, inputs)
            self.known[structure.name] = found
        return self.known[structure.name]


def kept_losses(losses: Sequence[float]) -> list[float]:
    """As they are written down, for comparisons in pairs."""
    return [round(loss, 5) for loss in losses]


def _count(units: Any) -> int:
    return len(units[0]) if isinstance(units[0], tuple) else len(units)
