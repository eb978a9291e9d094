"""Proof by computation for ONNX: the slim model against the masked one, both in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from graphprune.errors import GraphPruneError, VerifyError
from graphprune.frontends.onnx.read import read_onnx
from graphprune.ir.onnx.feeds import random_feeds
from graphprune.ir.onnx.files import STREAMED_ABOVE, temporary_file
from graphprune.ir.onnx.ort import onnx_session, saturates
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.onnx.randomness import draws_numbers, seed_operators
from graphprune.ir.onnx.tensors import weight_bytes
from graphprune.oracle.masked_onnx import mask_onnx
from graphprune.oracle.verification import Certificate, compare, spoilt
from graphprune.oracle.verification_steps import Steps, compare_steps, has_steps
from graphprune.plan.plan import Plan

TOLERANCE = 1e-4
_SATURATED = (
    "ONNX Runtime's products of unsigned and signed bytes overflow on this processor, which has no "
    "VNNI, in the dense model too: quantise with reduce_range=True, or prune on another machine"
)
_OF_BYTES = {
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
    "QLinearConv", "QLinearMatMul",
}  # fmt: skip
Feeds = Mapping[str, NDArray[Any]]


@runtime_checkable
class SlimGraph(Protocol):
    """What is read of a slim ONNX model; `graphprune.rewrite.slim_onnx.SlimOnnx` has it."""

    def rewritten(self) -> ir.Model:
        """Its graph."""


def verify_onnx(
    program: OnnxProgram,
    plan: Plan,
    slim: SlimGraph | Path,
    inputs: Feeds | None = None,
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> Certificate:
    """Compare a slim ONNX model with the masked one.

    Args:
        program: the dense program.
        plan: what was applied to it.
        slim: the result, or the file that it was written to.
        inputs: input name to array, of the shapes of the program's first example; None for random
            ones.
        tolerance: the difference allowed, in parts of max(1, largest value of the output); None
            for 1e-4.
        seed: of the random inputs.

    Raises:
        VerifyError: ONNX Runtime can't run one of the models, or an operator has no masked form.
        EmitError: there is no room for temporary files as large as the models.
    """
    feeds = dict(inputs or random_feeds(program, seed))
    allowed = TOLERANCE if tolerance is None else tolerance
    large = weight_bytes(program.model) > STREAMED_ABOVE
    with _dense_file(program) as file:
        dense = _run(file, feeds, mapped=large)
    if isinstance(slim, Path) and not draws_numbers(program.model):
        found = _run(slim, feeds, mapped=large)
    else:
        thin = read_onnx(slim) if isinstance(slim, Path) else slim.rewritten()
        seed_operators(thin)
        with temporary_file(thin, "slim.onnx") as file:
            found = _run(file, feeds, mapped=large)
    masked = program.model.clone()
    selection = plan.bind(program)
    cuts = [b for cut in selection.cuts.values() for b in cut]
    mask_onnx(masked, program.known, program.typing, selection.keep, cuts)
    seed_operators(masked)
    with temporary_file(masked, "masked.onnx") as file:
        expected = _run(file, feeds, mapped=large)
    names = [value.name or "" for value in program.model.graph.outputs]
    pieces = Steps(compare(names, expected, found, allowed), 0, 0.0)
    if program.encodings or has_steps(program.model):
        thin = read_onnx(slim) if isinstance(slim, Path) else slim.rewritten()
        keep = selection.keep
        pieces = compare_steps(program, keep, masked, thin, feeds, _numbers, allowed)
    differences = pieces.differences
    for i in range(-len(names), 0):  # outputs are the last, behind steps
        if spoilt(dense[i], expected[i]):
            problem = "pruning makes it NaN or infinite"
            differences[i] = replace(differences[i], problem=problem)
    effects = compare(names, dense, expected, np.inf)
    wrong = any(d.problem is not None for d in differences)
    return Certificate.of(
        differences,
        dense_difference=max((d.error for d in effects), default=0.0),
        dtype="float32",
        tolerance=allowed,
        outputs=tuple(names),
        inputs="inputs that were given" if inputs is not None else f"random inputs, seed {seed}",
        steps=pieces.number,
        drift=pieces.drift,
        hint=_SATURATED if wrong and _multiplies_bytes(program.model) and saturates() else None,
    )


@contextmanager
def _dense_file(program: OnnxProgram) -> Iterator[Path]:
    """The dense model as a file whose random numbers are the same in every session."""
    if not draws_numbers(program.model):
        with program.file() as file:
            yield file
        return
    model = program.model.clone()
    seed_operators(model)
    with temporary_file(model, "dense.onnx") as file:
        yield file


def _run(file: Path, feeds: Feeds, *, mapped: bool) -> list[torch.Tensor]:
    try:
        found = onnx_session(file, mapped=mapped).run(None, dict(feeds))
    except Exception as error:  # ONNX Runtime has a class of its own for every code
        told = error.why if isinstance(error, GraphPruneError) else None
        why = told or str(error)
        raise VerifyError(
            "ONNX Runtime can't run the model", where=file.name, why=why.strip()[:500]
        ) from error
    return [_numbers(x) for x in found]


def _multiplies_bytes(model: ir.Model) -> bool:
    return any(node.op_type in _OF_BYTES for node in model.graph)


def _numbers(value: Any) -> torch.Tensor:
    """An output as numbers; of a sequence those of all its elements, of text its bytes."""
    if value is None:  # an empty optional
        return torch.empty(0)
    if isinstance(value, list):
        parts = [_numbers(element).reshape(-1) for element in value]
        return torch.cat(parts) if parts else torch.empty(0)
    if value.dtype.kind == "O":
        text = np.asarray(value, dtype=np.str_).reshape(-1)
        return torch.tensor(list("\n".join(text).encode()), dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(value))
