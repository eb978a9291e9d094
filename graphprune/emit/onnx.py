"""Writing a slim program as an ONNX file, checked and compared in ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.errors import EmitError, VerifyError

if TYPE_CHECKING:
    from graphprune.rewrite.slim import Slim

# ONNX Runtime's kernels round differently; relative to the largest output.
TOLERANCE = 1e-3
# A protobuf file can't exceed 2 GiB; above this, weights go to a second file.
EXTERNAL_ABOVE = 1 << 30


def save(slim: Slim, path: Path) -> None:
    """Write `slim` as ONNX; large weights go to ``<path>.data`` beside it.

    Dynamic dimensions stay dynamic. Inputs have the names of the traced arguments, outputs those
    of the model's output fields where it has names for them.

    Raises:
        EmitError: the exporter can't convert the graph, or writing failed.
        VerifyError: ONNX Runtime computes something else. In both cases no file is written.
    """
    expected, names = _run(slim)
    model = convert(slim.exported, names)
    with placed(path) as file:
        model.save(str(file), external_data=slim.cost.bytes > EXTERNAL_ABOVE)
        onnx.checker.check_model(str(file), full_check=True)
        _compare(slim, file, expected)


@contextlib.contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A file in a temporary sibling that takes its place at `path`, with its data, at the end.

    Raises:
        EmitError: the file system refused. Nothing is left behind then, nor after other errors.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as holder:
            yield Path(holder) / path.name
            for written in sorted(Path(holder).iterdir(), reverse=True):  # the data file first
                os.replace(written, path.parent / written.name)
    except OSError as error:
        raise EmitError(
            "can't write the ONNX file", where=str(path), why=error.strerror or str(error)
        ) from error


def _run(slim: Slim) -> tuple[list[torch.Tensor], list[str]]:
    """The slim model's tensor outputs on the example, and their names."""
    args, kwargs = slim.program.example
    with torch.no_grad():
        output = slim.exported.module()(*args, **kwargs)
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
    if isinstance(output, Mapping) and len(output) == len(leaves):
        return leaves, [str(k) for k in output]
    if len(leaves) == 1:
        return leaves, ["output"]
    return leaves, [f"output_{i}" for i in range(len(leaves))]


def convert(
    exported: ExportedProgram, names: Sequence[str], inputs: Sequence[str] | None = None
) -> Any:
    """Convert a program by torch's exporter, with these names of outputs (and inputs).

    Raises:
        EmitError: the exporter can't.
    """
    try:
        with _quiet():
            return torch.onnx.export(
                exported, dynamo=True, verbose=False, output_names=names, input_names=inputs
            )
    except Exception as error:  # the exporter wraps any failure of a translation
        raise EmitError(
            "torch's ONNX exporter can't convert the model",
            why=str(error.__cause__ or error).strip().splitlines()[0][:300],
            hint="use another format, or another attention implementation of the model",
        ) from error


def _compare(slim: Slim, file: Path, expected: list[torch.Tensor]) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    leaves = [x for x in pytree.tree_leaves(slim.program.example) if isinstance(x, torch.Tensor)]
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), leaves, strict=True)}
    for found, wanted in zip(session.run(None, feeds), expected, strict=True):
        reference = wanted.float().numpy()
        scale = max(1.0, float(np.abs(reference).max(initial=0.0)))
        error = float(np.abs(found.astype(np.float32) - reference).max(initial=0.0))
        if not error <= TOLERANCE * scale:
            raise VerifyError(
                "ONNX Runtime gives other outputs than the slim model",
                why=f"the largest difference is {error:.3g} at a scale of {scale:.3g}",
                hint="please report this; the other formats are not affected",
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress messages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
