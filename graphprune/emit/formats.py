"""Which formats a compilation writes, and which of them its source can have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.errors import EmitError
from graphprune.files.paths import file_of, is_factory
from graphprune.recipe.recipe import FORMATS, Recipe
from graphprune.report.report import Report

if TYPE_CHECKING:
    import torch

    from graphprune.analysis.program import BaseProgram
    from graphprune.rewrite.slim import Slim

_WEIGHTS_ALONE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


def with_formats(
    recipe: Recipe,
    source: str | Path | torch.nn.Module | BaseProgram,
    output: str | Path | None,
) -> Recipe:
    """The recipe with a format that the source can have, where it asks for none.

    Raises:
        EmitError: it asks for one that the source can't have, or the output has the name of a file
            of weights alone.
    """
    _check_name(output)
    asked = "formats" in recipe.model_fields_set
    if isinstance(source, str | Path):
        suffix = Path(source).suffix
        onnx = suffix == ".onnx"
        checkpoint = not is_factory(source) and suffix not in (".pt2", ".onnx")
    else:
        from graphprune.analysis.program import BaseProgram

        program = source if isinstance(source, BaseProgram) else None  # or a module
        onnx = program is not None and program.format == "onnx"
        checkpoint = program is not None and program.source is not None
    if onnx and asked and recipe.formats != ("onnx",):
        raise _only_onnx(source)
    if onnx:
        return recipe.replaced(formats=("onnx",))
    if asked and "hf" in recipe.formats and Path(str(source)).suffix == ".pt2":
        raise _no_checkpoint(source)
    if asked or checkpoint:
        return recipe
    suffix = Path(output or "").suffix.removeprefix(".")
    form = suffix if suffix in FORMATS else "pt2"
    return recipe.replaced(formats=(form,))


def check_formats(
    formats: Sequence[str],
    program: BaseProgram,
    source: object,
) -> None:
    """See that a program can be written in all formats.

    Raises:
        EmitError: it can't.
    """
    if program.format == "onnx":
        if tuple(formats) != ("onnx",):
            raise _only_onnx(source)
        return
    if "hf" in formats and program.source is None:
        raise _no_checkpoint(source)
    if "onnx-decoder" in formats:
        from graphprune.emit.decoder import precheck

        precheck(program)


def _check_name(output: str | Path | None) -> None:
    """Refuse names of files that hold weights without the model that they are of."""
    suffix = Path(output or "").suffix.lower()
    if suffix in _WEIGHTS_ALONE:
        raise EmitError(
            f"an output can't be a {suffix} file",
            where=str(output),
            why="such a file holds weights alone, and a pruned model has other sizes too",
            hint="give a directory, which gets model.safetensors where the model is a checkpoint, "
            "or a name that ends in .pt2 or .onnx",
        )


def _only_onnx(source: object) -> EmitError:
    return EmitError(
        "an ONNX model can only be written as ONNX",
        where=shown(source),
        hint="ask for format onnx and an output that ends in .onnx, or a directory",
    )


def _no_checkpoint(source: object) -> EmitError:
    return EmitError(
        "only a transformers model can be written as a Hugging Face checkpoint",
        where=shown(source),
        hint="ask for formats pt2 or onnx",
    )


def shown(source: object) -> str:
    """A source as the report names it: found again from any directory."""
    if not isinstance(source, str | Path):
        return type(source).__name__
    path = file_of(source)
    if not path.exists():
        return str(source)
    name = f":{str(source).rpartition(':')[2]}" if is_factory(source) else ""
    return f"{path.absolute()}{name}"


def native_form(slim: Slim, recipe: Recipe) -> tuple[bool, tuple[str, ...]]:
    """Whether a plain config can hold the plan, and notes; says so before the work starts.

    Raises:
        EmitError: none can, and the recipe requires one.
    """
    from graphprune.emit.hf import precheck

    problems = precheck(slim)
    if not problems:
        return True, ()
    if recipe.native == "require":
        raise EmitError(
            "no native Hugging Face config can hold this plan",
            why="; ".join(problems),
            hint="ask for uniform sizes, for formats pt2 or onnx, or for native: prefer",
        )
    return False, (f"{_SELF_CONTAINED} ({problems[0]})",)


_SELF_CONTAINED = (
    "no native config holds this plan: the checkpoint is self-contained, "
    "for graphprune.load or trust_remote_code=True"
)


def form_written(report: Report, directory: Path, recipe: Recipe) -> Report:
    """Note it if the checkpoint became self-contained although the shapes would have fitted.

    Raises:
        EmitError: it did, and the recipe requires a native one.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "graphprune" not in config or not report.native:
        return report
    if recipe.native == "require":
        raise EmitError(
            "no native Hugging Face config can hold this plan",
            why="the model class computes other factors from the new sizes",
            hint="ask for formats pt2 or onnx, or for native: prefer",
        )
    return replace(report, native=False, notes=(*report.notes, _SELF_CONTAINED))
