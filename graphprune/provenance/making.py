"""What a run was told and what it has read, for the recipe and the report that it writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.result import Samples
from graphprune.calibration.text.read import OWN_TEXTS, SELF
from graphprune.emit.formats import shown
from graphprune.recipe.recipe import Recipe
from graphprune.report.digests import data_digest, samples_digest, source_digest
from graphprune.report.provenance import Provenance, command, now, versions
from graphprune.report.report import Report


@dataclass(frozen=True)
class Used:
    """Samples that a run has computed with.

    Attributes:
        source: as `Samples` has it.
        described: one line on them.
        sha256: of them.
    """

    source: str
    described: str
    sha256: str


@dataclass(frozen=True)
class Making:
    """One run.

    Attributes:
        source: the model, as it was given.
        weights: the file with the weights of a factory's module.
        opening: the arguments of `graphprune.load` that let something through.
        sweep: what the sweep found that the recipe comes from; None where it comes from none.
        used: by what they were for, the samples that were computed with.
    """

    source: object = None
    weights: str | Path | None = None
    opening: Mapping[str, bool] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None
    used: dict[str, Used] = field(default_factory=dict)

    def use(self, purpose: str, samples: Samples) -> None:
        """Note samples, before they are let go."""
        source = samples.source
        told = replace(samples, source=located(source)) if os.path.exists(source) else samples
        self.used[purpose] = Used(source, told.described(), samples_digest(samples.data))

    def provenance(
        self, program: BaseProgram, recipe: Recipe, report: Report, tell: Callable[[str], None]
    ) -> Provenance:
        """How the output was made; what was read from files is read again and hashed.

        Args:
            program: the dense model, as it was loaded.
            recipe: with nothing left open.
            report: what is known so far.
            tell: told how far it is.

        Raises:
            LoadError: a file can't be read any more.
        """
        found = {name: data_digest(name, tell) for name in self._named(recipe, report)}
        return Provenance(
            versions=versions(),
            seed=recipe.seed,
            source=source_digest(program, self.source, self.weights, tell),
            data={located(name): one for name, one in found.items() if one is not None},
            samples={
                purpose: {"described": one.described, "sha256": one.sha256}
                for purpose, one in self.used.items()
            },
            command=command(),
            date=now(),
        )

    def _named(self, recipe: Recipe, report: Report) -> list[str]:
        """What was read beside the model, as the recipe calls it."""
        wanted = recipe.calibration
        names: list[str | None] = [*recipe.plans]
        if self.used:
            names += wanted.sources or [one.source for one in self.used.values()]
        names += report.before.perplexities
        if self.used or report.before.perplexities:
            names.append(wanted.tokenizer)
        return list(dict.fromkeys(name for name in names if name is not None))


def located(source: str) -> str:
    """What a recipe names, so that it is found again from any directory."""
    return source if source in (*OWN_TEXTS, SELF) else shown(source)
