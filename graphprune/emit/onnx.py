"""Writing a slim program as an ONNX file, checked and compared in ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.errors import EmitError, VerifyError
from graphprune.files import replacing
from graphprune.ir.onnx.external import name_data
from graphprune.ir.onnx.files import EXTERNAL_ABOVE, check_graph
from graphprune.ir.torch.randomness import noise_sources

if TYPE_CHECKING:
    from graphprune.rewrite.slim import Slim

# ONNX Runtime's kernels round differently; relative to the largest output.
TOLERANCE = 1e-3
SMALL = 0.01
"""Smaller outputs are compared as if they were as large: probabilities are, of many classes."""


def save(slim: Slim, path: Path) -> None:
    """Write `slim` as ONNX; large weights go to a second file, see `graphprune.ir.onnx.external`.

    Dynamic dimensions stay dynamic. bfloat16 weights are written as float32, the same values: ONNX
    Runtime has no kernels for bfloat16 on the CPU. Inputs have the names of the traced arguments,
    outputs those of the model's output fields where it has names for them.

    Raises:
        EmitError: the exporter can't convert the graph, or writing failed.
        VerifyError: ONNX Runtime computes something else. In both cases no file is written.
    """
    check_noise(slim.exported)
    exported, example = _runnable(slim)
    expected, names = _run(exported, example)
    model = convert(exported, names)
    size = sum(t.nbytes for t in (*exported.state_dict.values(), *exported.constants.values())
               if isinstance(t, torch.Tensor))  # fmt: skip
    with replacing(path) as file:
        model.save(str(file), external_data=size > EXTERNAL_ABOVE)
        name_data(file)
        check_graph(file)
        _compare(example, file, expected)


def check_noise(exported: ExportedProgram) -> None:
    """Refuse programs that draw random numbers.

    Raises:
        EmitError: it draws some; the message says where.
    """
    found = noise_sources(exported.graph)
    if found:
        raise EmitError(
            "an ONNX file of a model that draws random numbers can't be checked",
            where=", ".join(found),
            why="ONNX Runtime draws other numbers than torch, whatever the seed",
            hint='make the random numbers an input of the model, or ask for format "pt2" or "hf"',
        )


def _runnable(slim: Slim) -> tuple[ExportedProgram, tuple[Any, Any]]:
    """The slim program and its example inputs in a type that ONNX Runtime computes in."""
    values = (n.meta.get("val") for n in slim.exported.graph.nodes if n.op == "placeholder")
    if not any(isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16 for v in values):
        return slim.exported, slim.program.example
    from graphprune.rewrite.retrace import retrace

    program = retrace(slim, torch.float32)
    return program.exported, program.example


def _run(
    exported: ExportedProgram, example: tuple[Any, Any]
) -> tuple[list[torch.Tensor], list[str]]:
    """A program's tensor outputs on the example, and their names."""
    args, kwargs = example
    with torch.no_grad():
        output = exported.module()(*args, **kwargs)
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


def _compare(example: tuple[Any, Any], file: Path, expected: list[torch.Tensor]) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    leaves = [x for x in pytree.tree_leaves(example) if isinstance(x, torch.Tensor)]
    try:
        session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), leaves, strict=True)}
        outputs = session.run(None, feeds)
    except Exception as error:  # ONNX Runtime has several
        raise EmitError(
            "ONNX Runtime can't run the slim model",
            why=str(error).strip().splitlines()[0][:300],
            hint="use another format, or load the model in another dtype",
        ) from error
    for found, wanted in zip(outputs, expected, strict=True):
        reference = wanted.float().numpy()
        scale = max(SMALL, float(np.abs(reference).max(initial=0.0)))
        largest = float(np.abs(found.astype(np.float32) - reference).max(initial=0.0))
        if not largest <= TOLERANCE * scale:
            raise VerifyError(
                "ONNX Runtime gives other outputs than the slim model",
                why=f"the largest difference is {largest:.3g} at a scale of {scale:.3g}",
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
