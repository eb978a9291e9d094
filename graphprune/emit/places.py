"""Where a run may write, and what it reads: both are settled before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.errors import EmitError
from graphprune.files.paths import file_of
from graphprune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from graphprune.analysis.program import BaseProgram

SOURCE = "the source"


def place_of(output: Path, *, single: bool) -> Path:
    """Where an output lies, with symbolic links followed.

    Args:
        output: a path, or a link to where a directory is or will be.
        single: whether it is a file. Plan, report and data lie beside it under its own name, which
            a link has not.

    Raises:
        EmitError: a place that can't be exchanged for another one in the end.
    """
    place = Path(os.path.realpath(output))
    if output.is_symlink() and (single or place.is_symlink()):
        raise EmitError(
            "the output is a symbolic link",
            where=str(output),
            why=f"it leads to {place}" if place != output else "it leads to itself",
            hint="give the path that is meant",
        )
    if not single and place.is_dir() and os.path.ismount(place):
        raise EmitError(
            "the output is the root of a file system, which can't be replaced",
            where=str(output),
            hint="give a directory in it",
        )
    if not single and place.is_dir() and Path.cwd().is_relative_to(place):
        raise EmitError(
            "the output is the working directory, or around it",
            where=str(output),
            why="it would be replaced by a new directory",
            hint="give another one, or run the command elsewhere",
        )
    return place


def check_apart(output: Path, written: Sequence[Path], reads: Mapping[str, Path]) -> None:
    """Refuse to replace what a run reads, or to write into its source.

    Args:
        output: as it was given.
        written: what will be replaced, with symbolic links followed.
        reads: what is read, by what it is called.

    Raises:
        EmitError: one lies in the other.
    """
    for what, path in reads.items():
        read = Path(os.path.realpath(path))
        if any(read.is_relative_to(place) for place in written):
            raise EmitError(
                f"the output would replace {what}",
                where=str(output),
                why=None if read == written[0] else f"that is {read}",
                hint="choose another output",
            )
        if what == SOURCE and read.is_dir() and written[0].is_relative_to(read):
            raise EmitError(
                "the output lies inside the source",
                where=str(output),
                why=f"the source is {read}",
                hint="choose another output",
            )


def read_by(
    source: object, recipe: object, settled: Recipe, weights: str | Path | None
) -> dict[str, Path]:
    """What a compilation reads from the disk, by what it is called.

    Args:
        source: the model.
        recipe: as it was given.
        settled: what it says.
        weights: the file with the weights of a factory's module.
    """
    wanted = settled.calibration
    given = {
        SOURCE: source,
        "the weights": weights,
        "the recipe": recipe,
        **dict.fromkeys(["the plan"][: len(settled.plans)], *settled.plans[-1:]),
        **{f"the calibration data {source}": source for source in wanted.sources},
        **{f"the text {text}": text for text in wanted.text or ()},
        "the tokenizer": wanted.tokenizer,
    }
    paths = {what: file_of(one) for what, one in given.items() if isinstance(one, str | Path)}
    return {what: path for what, path in paths.items() if os.path.exists(path)}


def mapped_from(source: object, weights: str | Path | None) -> list[Path]:
    """The files whose weights are read when they are needed, as far as the arguments tell."""
    lazily = isinstance(source, str | Path) and (
        os.path.isdir(source) or Path(source).suffix == ".onnx"
    )
    return [Path(p) for p in (source if lazily else None, weights) if isinstance(p, str | Path)]


def mapped_by(program: BaseProgram) -> Iterable[Path]:
    """The same, of a program."""
    return program.files
