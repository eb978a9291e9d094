"""What can be told of a compilation before torch is imported and a model is loaded.

A mistake that names, kinds and small files show is told at once, not after minutes of work. What
only the traced graph can tell (that a model lacks a role, or has no such width) is checked right
after tracing; see `graphprune.pipeline.defaults`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.checkpoints.given import check_source, directory_of
from graphprune.checkpoints.shards import without_weights
from graphprune.emit.formats import with_formats
from graphprune.emit.places import read_by
from graphprune.emit.target import Target
from graphprune.errors import EmitError, LoadError, RecipeError
from graphprune.files.paths import usable
from graphprune.preflight.data import check_data
from graphprune.preflight.known import Known
from graphprune.preflight.plan import check_plan, check_sizes
from graphprune.preflight.readers import check_read
from graphprune.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from graphprune.analysis.program import BaseProgram


def check_request(
    source: str | Path | torch.nn.Module | BaseProgram,
    recipe: Recipe,
    output: str | Path | None,
    given: object = None,
    example: object = None,
    weights: str | Path | None = None,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    trust: bool = False,
    progress: Callable[[str], None] | None = None,
) -> None:
    """See that what a compilation is asked for is there and goes together.

    Args:
        source: see `graphprune.compile`.
        recipe: settled.
        output: see `graphprune.compile`.
        given: the recipe as it was given, which may be a file.
        example: see `graphprune.compile`.
        weights: a safetensors file for the module of a factory.
        dry_run: whether nothing is to be written.
        overwrite: whether an output that exists is replaced.
        resume: whether an interrupted run goes on.
        trust: whether a checkpoint or a ``.pt2`` file may run code of its own.
        progress: told where a checkpoint has to be fetched first.

    Raises:
        GraphPruneError: something that the caller can put right.
    """
    if dry_run and resume:
        raise RecipeError(
            "a dry run has nothing to go on from",
            where="resume",
            hint="leave out one of --dry-run and --resume",
        )
    if output is None and not dry_run:
        raise EmitError("there is no output", hint="give one, or ask for a dry run")
    if isinstance(source, str | Path):
        if example is not None:
            raise LoadError(
                "example inputs go with a module",
                where=str(source),
                why="a source on disk is traced on inputs of its own",
                hint="leave example out, or let a factory return (module, args)",
            )
        check_source(source, weights)
    known = Known.of(source)
    recipe = with_formats(recipe, source, output)
    _check_native(recipe)
    if output is not None:
        usable(output, EmitError)
        Target.of(output, recipe, overwrite, read_by(source, given, recipe, weights))
        _check_place(Path(output))
    _check_with(recipe, known, dry_run)
    if known.remote and isinstance(source, str | Path):
        (progress or (lambda stage: None))("looking for the checkpoint")
        _check_with(recipe, replace(known, directory=directory_of(source, trust=trust)), dry_run)


def _check_with(recipe: Recipe, known: Known, dry_run: bool) -> None:
    check_read(recipe, known.causal)
    check_data(recipe, known)
    check_plan(recipe, known)
    check_sizes(recipe, known)
    if known.weightless and not dry_run:
        raise without_weights(known.directory, str(known.directory))


def _check_native(recipe: Recipe) -> None:
    if recipe.native == "require" and "hf" not in recipe.formats:
        raise RecipeError(
            "only a Hugging Face checkpoint can have a native form",
            where="native: require",
            why=f"this run writes {', '.join(recipe.formats)}",
            hint="leave native out, or ask for format hf",
        )


def _check_place(output: Path) -> None:
    """See that the output can be made where it is to be: nothing is written to find out."""
    folder = next(p for p in output.absolute().parents if p.exists())
    if not folder.is_dir():
        raise EmitError(
            "the output lies in something that is no directory",
            where=str(output),
            why=f"{folder} is a file",
            hint="choose another output",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EmitError(
            "can't write the output",
            where=str(output),
            why=f"you may not write in {folder}",
            hint="choose another output",
        )
