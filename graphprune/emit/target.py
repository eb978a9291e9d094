"""Where a compilation writes: one directory for all formats, or one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from graphprune.emit.places import check_apart, place_of
from graphprune.errors import EmitError
from graphprune.files import Claim, claimed
from graphprune.files.refusals import check_space, refused
from graphprune.recipe.recipe import FORMATS, Recipe
from graphprune.report.names import COMPANIONS, PLAN_FILE

Format = Literal["hf", "pt2", "onnx", "onnx-decoder"]
FILES = {"onnx": "model.onnx", "onnx-decoder": "decoder.onnx", "pt2": "model.pt2"}
"""What formats that are files are called in a directory."""


@dataclass(frozen=True)
class Target:
    """Where a compilation writes.

    Attributes:
        path: a directory, or a file where `single` is set; all symbolic links are followed.
        formats: what to write there; hf comes first, since it makes the directory.
        single: the output is one file.
        given: the path as the user knows it.
        overwrite: whether what is there may be replaced.
        claim: the right to write there; None before the run has it.
    """

    path: Path
    formats: tuple[Format, ...]
    single: bool
    given: Path
    overwrite: bool
    claim: Claim | None = None

    @classmethod
    def of(
        cls,
        output: str | Path | None,
        recipe: Recipe,
        overwrite: bool,
        reads: Mapping[str, Path],
    ) -> Target:
        """Settle what goes where.

        Args:
            output: as the user gave it.
            recipe: what to write.
            overwrite: whether what is there may be replaced.
            reads: what the run reads, by what it is called.

        Raises:
            EmitError: there is no output, it exists, it can't hold the formats, or what the run
                reads would be replaced.
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
        with refused(path):  # a name may be too long
            place = place_of(path, single=single)
            target = cls(place, cast("tuple[Format, ...]", formats), single, path, overwrite)
            check_apart(path, target.written, reads)
            target.check_free()
        return target

    @property
    def written(self) -> tuple[Path, ...]:
        """Everything that is put in place; the model first."""
        if not self.single:
            return (self.path,)
        return (self.path, *(self.path.with_name(self.name(kind)) for kind in COMPANIONS))

    def check_free(self) -> None:
        """Refuse an output that exists, unless it may and can be replaced without harm.

        Raises:
            EmitError: it is.
        """
        found = next((p for p in self.written if p.is_file() or _holds_something(p)), None)
        where = str(self.given if found in (None, self.path) else found)
        if found is not None and not self.overwrite:
            raise EmitError(
                "the output exists", where=where, hint="choose another, or allow overwriting it"
            )
        if self.single and any(p.is_dir() for p in self.written):
            raise EmitError("the output is a directory", where=where)
        if not self.single and self.path.is_file():
            raise EmitError("the output is a file", where=where, hint="remove it yourself")
        # A mistyped path must not cost somebody a home directory.
        if found is not None and not self.single and not (self.path / PLAN_FILE).is_file():
            raise EmitError(
                "the output is a directory that graphprune did not write",
                where=where,
                why=f"it has no {PLAN_FILE}",
                hint="choose another, or remove it yourself",
            )

    @contextmanager
    def claimed(self) -> Iterator[Target]:
        """Have the output for this run alone; what a run that was killed has left is put right.

        Raises:
            EmitError: another run has it, it exists now, or the file system refuses.
        """
        with claimed(self.path, overwrite=self.overwrite) as claim:
            self.check_free()
            yield replace(self, claim=claim)

    def check_space(self, size: int) -> None:
        """See that the disk has room for the model in every format.

        Weights that are too many for memory are there once more while they are written.

        Args:
            size: bytes of its weights.

        Raises:
            EmitError: it hasn't.
        """
        from graphprune.checkpoints import memory  # imports torch

        large = size > memory.HELD
        check_space(self.path, size * (len(self.formats) + large))

    def name(self, kind: str) -> str:
        """File name of a format or of one of `COMPANIONS`; of hf the directory itself."""
        if kind in COMPANIONS:
            default = COMPANIONS[kind]
            return f"{self.path.name}.{default}" if self.single else default
        if self.single:
            return self.path.name
        return FILES.get(kind, "")

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory to write into, whose files take their places if the block ends well."""
        assert self.claim is not None
        with self.claim.writing() as staged:
            if self.single:
                yield staged.parent
                return
            if "hf" not in self.formats:  # the checkpoint makes its directory itself
                staged.mkdir()
            yield staged

    def shown(self, kind: str) -> str:
        """Path of a format for people to read."""
        return str(self.given / self.name(kind)) if not self.single else str(self.given)


def _holds_something(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
