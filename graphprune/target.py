"""Where a compilation writes: one directory for all formats, or one file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from graphprune.errors import EmitError
from graphprune.files import replacing
from graphprune.recipe import FORMATS, Recipe

PLAN_FILE = "graphprune_plan.json"
REPORT_FILE = "report.json"

Format = Literal["hf", "pt2", "onnx", "onnx-decoder"]
FILES = {"onnx": "model.onnx", "onnx-decoder": "decoder.onnx", "pt2": "model.pt2"}
"""What formats that are files are called in a directory."""


@dataclass(frozen=True)
class Target:
    """Where a compilation writes.

    Attributes:
        path: a directory, or a file where `single` is set.
        formats: what to write there; hf comes first, since it makes the directory.
        single: the output is one file.
    """

    path: Path
    formats: tuple[Format, ...]
    single: bool

    @classmethod
    def of(
        cls, output: str | Path | None, recipe: Recipe, overwrite: bool, source: object
    ) -> Target:
        """Settle what goes where.

        Raises:
            EmitError: there is no output, it exists, or it can't hold the formats.
        """
        if output is None:
            raise EmitError("there is no output", hint="give one, or ask for a dry run")
        path = Path(output)
        suffix = path.suffix.removeprefix(".")
        single = suffix in ("pt2", "onnx")
        formats = tuple(name for name in FORMATS if name in recipe.formats)
        if single:
            fitting = [name for name in formats if FILES.get(name, "").endswith(path.suffix)]
            if "formats" not in recipe.model_fields_set:
                formats = (suffix,)
            elif len(formats) > 1 or not fitting:
                raise EmitError(
                    f"a .{suffix} file can't hold {', '.join(formats)}",
                    where=str(path),
                    hint=f"ask for format {suffix}, or give a directory as output",
                )
        _check_free(path, single, overwrite, source)
        return cls(path, cast("tuple[Format, ...]", formats), single)

    def name(self, kind: str) -> str:
        """File name of a format, of "plan" or "report"; of hf the directory itself."""
        if kind in ("plan", "report"):
            default = {"plan": PLAN_FILE, "report": REPORT_FILE}[kind]
            return f"{self.path.name}.{default}" if self.single else default
        if self.single:
            return self.path.name
        return FILES.get(kind, "")

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory to write into, whose files take their places if the block ends well."""
        if not self.single:
            with replacing(self.path) as staged:
                if "hf" not in self.formats:  # the checkpoint makes its directory itself
                    staged.mkdir()
                yield staged
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=f".{self.path.name}.", dir=self.path.parent
            ) as staged_name:
                yield Path(staged_name)
                # The model comes last: where it is, its data, plan and report are too.
                for file in sorted(Path(staged_name).iterdir(), reverse=True):
                    os.replace(file, self.path.parent / file.name)
        except OSError as error:
            raise EmitError(
                "can't write the output", where=str(self.path), why=error.strerror or str(error)
            ) from error

    def shown(self, kind: str) -> str:
        """Path of a format for people to read."""
        return str(self.path / self.name(kind)) if not self.single else str(self.path)


def beside(path: Path, kind: str) -> Path:
    """The plan or the report that belongs to a written directory or file."""
    default = {"plan": PLAN_FILE, "report": REPORT_FILE}[kind]
    return path / default if path.is_dir() else path.with_name(f"{path.name}.{default}")


def _check_free(path: Path, single: bool, overwrite: bool, source: object) -> None:
    """Refuse an output that exists, unless it may and can be replaced without harm."""
    occupied = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if occupied and not overwrite:
        raise EmitError(
            "the output exists", where=str(path), hint="choose another, or allow overwriting it"
        )
    data = Path(f"{path}.data")  # of a large ONNX model
    if single and path.suffix == ".onnx" and data.exists() and not overwrite:
        raise EmitError(
            "the output exists", where=str(data), hint="choose another, or allow overwriting it"
        )
    if single and path.is_dir():
        raise EmitError("the output is a directory", where=str(path))
    if not single and path.is_file():
        raise EmitError("the output is a file", where=str(path), hint="remove it yourself")
    # A mistyped path must not cost somebody a home directory.
    if occupied and not single and not (path / PLAN_FILE).is_file():
        raise EmitError(
            "the output is a directory that graphprune did not write",
            where=str(path),
            why=f"it has no {PLAN_FILE}",
            hint="choose another, or remove it yourself",
        )
    if isinstance(source, str | Path) and Path(source).exists():
        dense = Path(source).resolve()
        if path.resolve() in (dense, *dense.parents):
            raise EmitError("the output would replace the source", where=str(path))
