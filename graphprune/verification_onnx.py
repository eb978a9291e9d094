"""Proof by computation for ONNX: the slim model against the masked one, both in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from graphprune.errors import VerifyError
from graphprune.evaluate import onnx_session
from graphprune.frontends.onnx import read_onnx
from graphprune.masked_onnx import mask_onnx
from graphprune.onnx_program import EXTERNAL_ABOVE, OnnxProgram, SlimOnnx, temporary_file
from graphprune.plan import Plan
from graphprune.verification import Certificate, compare, spoilt

TOLERANCE = 1e-4
Feeds = Mapping[str, NDArray[Any]]

# Operators that hand indices on as they are, on their way to a table.
_SAME_VALUES = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"}


def verify_onnx(
    program: OnnxProgram,
    plan: Plan,
    slim: SlimOnnx | Path,
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
    """
    feeds = dict(inputs or random_feeds(program, seed))
    allowed = TOLERANCE if tolerance is None else tolerance
    external = program.costs.total().bytes > EXTERNAL_ABOVE
    if isinstance(slim, Path):
        found = _run(slim, feeds)
    else:
        with temporary_file(slim.rewritten(), "slim.onnx", external=external) as file:
            found = _run(file, feeds)
    masked = read_onnx(program.path)
    mask_onnx(masked, program.known, program.typing, plan.bind(program).keep)
    with temporary_file(masked, "masked.onnx", external=external) as file:
        expected = _run(file, feeds)
    dense = _run(program.path, feeds)
    names = [value.name or "" for value in program.model.graph.outputs]
    differences = compare(names, expected, found, allowed)
    for i, d in enumerate(differences):
        if spoilt(dense[i], expected[i]):
            differences[i] = replace(d, problem="pruning makes it NaN or infinite")
    effects = compare(names, dense, expected, np.inf)
    return Certificate.of(
        differences,
        dense_difference=max((d.error for d in effects), default=0.0),
        dtype="float32",
        tolerance=allowed,
        outputs=tuple(names),
        inputs="inputs that were given" if inputs is not None else f"random inputs, seed {seed}",
    )


def random_feeds(program: OnnxProgram, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random inputs of the first example's shapes; indices are within what they point into."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    for value in program.model.graph.inputs:
        name = value.name or ""
        known = program.known[name]
        shape, dtype = known.shapes[0], known.dtype.numpy()
        if known.dtype.is_floating_point():
            feeds[name] = rng.standard_normal(shape).astype(dtype)
        else:
            feeds[name] = rng.integers(0, _bound(program, value), shape).astype(dtype)
    return feeds


def _bound(program: OnnxProgram, value: ir.Value) -> int:
    """What the elements of an integer input have to stay below; 2 for what isn't looked up."""
    bounds = []
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        for use in current.uses():
            node = use.node
            if node.op_type == "Gather" and use.idx == 1:
                table = node.inputs[0]
                axis = node.attributes.get_int("axis", 0)
                known = None if table is None else program.known.get(table.name or "")
                if known is not None:
                    bounds.append(known.shapes[0][axis])
            elif node.op_type in _SAME_VALUES and node not in seen:
                seen.add(node)
                waiting.extend(node.outputs)
    return max(1, min(bounds, default=2))


def _run(file: Path, feeds: Feeds) -> list[torch.Tensor]:
    try:
        found = onnx_session(file).run(None, dict(feeds))
        return [torch.from_numpy(np.ascontiguousarray(x)) for x in found]
    except Exception as error:  # ONNX Runtime has a class of its own for every code
        raise VerifyError(
            "ONNX Runtime can't run the model",
            where=str(file.name),
            why=str(error).strip()[:500],
        ) from error
