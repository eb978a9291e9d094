"""What has to hold for every ONNX graph and every plan.

The judges are the masked model in ONNX Runtime and, for graphs that don't notice zeros, ONNX's
reference implementation on the dense graph with zeros in its initialisers.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import graphprune as gp
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from properties.check import Unsuitable, plans
from properties.onnx_drawing import Array, Case

TOLERANCES = {"float32": 2e-4, "float64": 1e-9}
Feeds = dict[str, Array]


def examine(case: Case, seed: int) -> int:
    """Everything, for one model and one plan, with inputs of a random scale.

    Returns:
        The number of plans that were checked.
    """
    rng = random.Random(seed)
    scale = rng.choice([1.0, 1.0, 0.01, 0.1, 10.0, 100.0, 10 ** rng.uniform(-2, 2)])
    feeds = [_scaled(f, scale) for f in case.feeds]
    with tempfile.TemporaryDirectory() as folder:
        dense, thin = Path(folder) / "dense.onnx", Path(folder) / "slim.onnx"
        onnx.save(case.model, dense)
        outputs = _runnable(dense, feeds)
        if case.plain:
            _same_as_reference(case.model, feeds[0], outputs)
        program = load_onnx(dense, {n: x.shape for n, x in feeds[0].items()})
        for node, reason in program.typing.opaque.items():
            assert not {"rule", "failed"} & set(reason.why.split()), (node, reason)
        done = 0
        for plan in plans(program, rng, 1):
            SlimOnnx(program, plan).save(thin)
            done += _judged(case, program, plan, thin, feeds)
    return done


def _judged(
    case: Case, program: OnnxProgram, plan: gp.Plan, thin: Path, feeds: list[Feeds]
) -> bool:
    onnx.checker.check_model(str(thin), full_check=True)
    slim = onnx.load(thin)
    _same_signature(case.model, slim)
    kept = plan.kept(program)
    tolerance = TOLERANCES[_type(case)]
    certificate = verify_onnx(program, plan, thin, feeds[0], tolerance=tolerance)
    problem = certificate.problem or ""
    if "pruning makes it NaN" in problem:
        return False
    noise = _noise(case.model, feeds[0]) if "it differs by" in problem else 0.0
    if certificate.max_rel_error < 100 * noise:
        return False
    certificate.raise_if_failed()
    if not case.plain:
        return True
    zeroed = _zeroed(case.model, program, kept)
    for given in feeds:
        wanted = ReferenceEvaluator(zeroed).run(None, given)
        found = _run(thin, given)
        noise = 100 * _noise(zeroed, given)
        for name, w, f in zip(certificate.outputs, wanted, found, strict=True):
            error = _distance(w, f)
            assert error <= max(tolerance, noise), f"{name}: {error:.2g} off the graph with zeros"
    return True


def _type(case: Case) -> str:
    """The floating type of a model."""
    kind = case.model.graph.output[0].type.tensor_type.elem_type
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _scaled(feeds: Feeds, scale: float) -> Feeds:
    return {n: (x * x.dtype.type(scale) if x.dtype.kind == "f" else x) for n, x in feeds.items()}


def _run(model: Path | bytes, feeds: Feeds) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        str(model) if isinstance(model, Path) else model,
        options,
        providers=["CPUExecutionProvider"],
    )
    found: list[Array] = session.run(None, feeds)
    return found


def _runnable(dense: Path, feeds: list[Feeds]) -> list[Array]:
    """The outputs of a model for the first of some inputs.

    Raises:
        Unsuitable: ONNX Runtime hasn't got one of its operators, or they aren't finite.
    """
    try:
        outputs = [_run(dense, f) for f in feeds]
    except Exception as error:  # ONNX Runtime has a class of its own for every code
        raise Unsuitable from error
    if not all(np.isfinite(x).all() for found in outputs for x in found):
        raise Unsuitable
    return outputs[0]


def _same_as_reference(model: onnx.ModelProto, feeds: Feeds, found: list[Array]) -> None:
    """Leave out graphs that ONNX Runtime and ONNX's reference read differently.

    Raises:
        Unsuitable: there is no telling which of them is right.
    """
    with np.errstate(all="ignore"):
        wanted = ReferenceEvaluator(model).run(None, feeds)
    for w, f in zip(wanted, found, strict=True):
        if w.shape != f.shape or not _distance(w, f) < 1e-3:
            raise Unsuitable


def _distance(wanted: Array, found: Array) -> float:
    """The largest difference in parts of the largest value, which counts as 1 at least."""
    assert wanted.shape == found.shape, f"{found.shape} instead of {wanted.shape}"
    difference = np.abs(wanted.astype(np.float64) - found.astype(np.float64))
    return float(difference.max(initial=0) / max(1.0, np.abs(wanted).max(initial=0)))


def _noise(model: onnx.ModelProto, feeds: Feeds) -> float:
    """How far outputs move when inputs and weights change in their last bits."""
    rng = np.random.default_rng(0)

    def moved(x: Any) -> Array:
        x = np.asarray(x)
        if x.dtype.kind != "f":
            return x
        bits = np.finfo(x.dtype).eps * rng.standard_normal(x.shape)
        return (x * (1 + bits)).astype(x.dtype)

    other = onnx.ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(moved(numpy_helper.to_array(tensor)), tensor.name))
    pair = (model, feeds), (other, {n: moved(x) for n, x in feeds.items()})
    a, b = (_run(m.SerializeToString(), f) for m, f in pair)
    return max((_distance(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _zeroed(model: onnx.ModelProto, program: OnnxProgram, kept: Any) -> onnx.ModelProto:
    """The dense graph, its initialisers and constants zero where a plan removes them."""
    zeroed = onnx.ModelProto()
    zeroed.CopyFrom(model)
    constants = [n for n in zeroed.graph.node if n.op_type == "Constant"]
    tensors = [(n.output[0], n.attribute[0].t) for n in constants]
    for name, tensor in [*((t.name, t) for t in zeroed.graph.initializer), *tensors]:
        array = numpy_helper.to_array(tensor)
        if name in kept and array.dtype.kind == "f":
            stays = np.zeros(array.shape, dtype=bool)
            stays[np.ix_(*kept[name])] = True
            tensor.CopyFrom(numpy_helper.from_array(np.where(stays, array, 0), tensor.name))
    return zeroed


def _same_signature(dense: onnx.ModelProto, slim: onnx.ModelProto) -> None:
    initial = {t.name for t in dense.graph.initializer}
    for side in ("input", "output"):
        before = [v.name for v in getattr(dense.graph, side) if v.name not in initial]
        left = {t.name for t in slim.graph.initializer}
        after = [v.name for v in getattr(slim.graph, side) if v.name not in left]
        assert before == after, f"{side}s {after} instead of {before}"
    assert slim.opset_import[0].version == dense.opset_import[0].version
