"""Writing ONNX models to files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from graphprune.errors import EmitError
from graphprune.files import replacing
from graphprune.ir.onnx.external import name_data
from graphprune.ir.onnx.tensors import weight_bytes

# A protobuf file can't exceed 2 GiB; above this, weights go to a second file.
EXTERNAL_ABOVE = 1 << 30

# A single file is put together in memory. Above this, temporary files and models that had a second
# file are written in two, weight by weight.
STREAMED_ABOVE = 1 << 26


def data_of(model: ir.Model) -> set[Path]:
    """The files that the initialisers of a model are in, where they aren't in the model's."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return {Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}


def write_model(model: ir.Model, path: Path, *, external: bool) -> None:
    """Write a model beside its place, check it, and put it there.

    Args:
        model: what to write.
        path: where.
        external: whether weights go to a second file; see `graphprune.ir.onnx.external`.

    Raises:
        EmitError: the checker refuses the model, or the file system does.
    """
    with replacing(path) as file:
        write_checked(model, file, external=external)


def write_checked(model: ir.Model, file: Path, *, external: bool) -> None:
    """Write a model where it is, and check it.

    Args:
        model: what to write.
        file: where; it may have a second file then.
        external: see `write_model`.

    Raises:
        EmitError: the checker refuses the model.
        OSError: the file system refuses.
    """
    _save(model, file, external=external)
    name_data(file)
    check_graph(file)


@contextlib.contextmanager
def temporary_file(model: ir.Model, name: str) -> Iterator[Path]:
    """A model as a file that is gone after the block.

    Raises:
        EmitError: the file system refuses it.
    """
    with contextlib.ExitStack() as stack:
        try:
            holder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graphprune-"))
            file = Path(holder) / name
            _save(model, file, external=weight_bytes(model) > STREAMED_ABOVE)
        except OSError as error:
            raise EmitError(
                "can't write a temporary ONNX file",
                where=tempfile.gettempdir(),
                why=error.strerror or str(error),
                hint="free some disk space, or set TMPDIR to another directory",
            ) from error
        yield file


def _save(model: ir.Model, file: Path, *, external: bool) -> None:
    if not external:
        ir.external_data.load_to_model(model)  # what the source has in another file
    ir.save(model, file, external_data=f"{file.name}.data" if external else None)


def check_graph(file: Path) -> None:
    """Have ONNX's checker look at a file, with shape inference.

    Raises:
        EmitError: it finds something.
    """
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # the checker has several
        raise EmitError(
            "the ONNX graph that was written is not valid",
            where=file.name,
            why=str(error).strip()[:500],
            hint="please report this; the other formats are not affected",
        ) from error
