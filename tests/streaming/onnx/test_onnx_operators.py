"""Operators and numbers that need care: what isn't finite, has no kernel, branches or is narrow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.errors import PlanError
from graphprune.streaming.onnx import pieces
from onnx_graphs import fused, graph, weights
from streaming.onnx_oracle import Looking, go, images, program_of, value_of

NOT_FINITE = """m (float[b, 4, 6] x) => (float[b, 4, 3] z) {
    a = MatMul (x, first)
    l = Log (a)
    r = Relu (l)
    c = Add (r, x)
    d = MatMul (c, second)
    t = Tanh (d)
    z = MatMul (t, head)
}"""


@pytest.mark.parametrize("batch", [1, 3])
def test_nan_names_the_operator_and_the_sample(tmp_path, batch):
    model = graph(
        NOT_FINITE, first=np.eye(6, dtype=np.float32), second=weights(6, 6), head=weights(6, 3)
    )
    next(n for n in model.graph.node if n.op_type == "Log").name = "/layer/Log"
    program = program_of(model, tmp_path)
    data = np.abs(weights(3, 4, 6)) + 0.1
    data[1, 2, 3] = -1.0
    with pytest.raises(PlanError, match="an activation that second reads") as caught:
        go(program, data, Looking(), batch=batch)
    assert caught.value.where == "Log /layer/Log (l) in layer, sample 1"
    assert "its operands are finite, the result holds NaN" in caught.value.why
    data[1, 2, 3] = np.nan
    with pytest.raises(PlanError, match="an activation that first reads") as caught:
        go(program, data, Looking(), batch=batch)
    assert caught.value.where == "the input x, sample 1"


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    broken = np.eye(6, dtype=np.float32)
    broken[2, 2] = np.inf
    model = graph(NOT_FINITE, first=broken, second=weights(6, 6), head=weights(6, 3))
    program = program_of(model, tmp_path)
    with pytest.raises(PlanError, match="an activation that second reads") as caught:
        go(program, np.abs(weights(3, 4, 6)) + 0.1, Looking())
    assert "the weight first holds NaN or infinity" in caught.value.why


def test_half_precision_models_have_statistics_in_float32(tmp_path):
    model = graph(
        """m (float16[b, 6] x) => (float16[b, 3] z) {
            a = MatMul (x, first)
            t = Tanh (a)
            z = MatMul (t, head)
        }""",
        first=weights(6, 6).astype(np.float16),
        head=weights(6, 3).astype(np.float16),
    )
    program = program_of(model, tmp_path)
    data = weights(4, 6)
    new, treatment = go(program, data)
    (moment,) = treatment.moments["first"]
    x = data.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(moment.total.numpy(), x.T @ x, rtol=1e-6)
    assert new["first"].dtype == torch.float16


def test_operators_without_a_kernel_are_run_by_the_reference_evaluator(tmp_path, monkeypatch):
    """ONNX Runtime has no convolution of float64."""
    kernel, second = (w.astype(np.float64) for w in (weights(6, 6, 3), weights(5, 7)))
    model = graph(
        """m (double[b, 6, 7] x) => (double[b, 6, 3] z) {
            c = Conv (x, kernel)
            t = Tanh (c)
            g = MatMul (t, second)
            u = Tanh (g)
            z = MatMul (u, head)
        }""",
        kernel=kernel, second=second, head=weights(7, 3).astype(np.float64),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    used = []
    original = pieces.ReferenceEvaluator

    def evaluator(proto):
        used.append([n.op_type for n in proto.graph.node])
        return original(proto)

    monkeypatch.setattr(pieces, "ReferenceEvaluator", evaluator)
    data = [{"x": weights(2, 6, 7, seed=i).astype(np.float64)} for i in range(3)]
    new, treatment = go(program, data)
    assert used == [["Conv", "Tanh"]]
    moment = treatment.moments["second"][0].total
    rows = np.concatenate([value_of(model, {"kernel": new["kernel"]}, d, "t") for d in data])
    rows = rows.reshape(-1, 5)
    assert moment.dtype == torch.float64
    np.testing.assert_allclose(moment.numpy(), rows.T @ rows, rtol=1e-12)


def test_what_nothing_can_run_is_an_error(tmp_path):
    model = fused(
        """m (float[1, 4, 6] x) => (float[1, 4, 3] z) {
            a = MatMul (x, first)
            b = ort.BiasSplitGelu (a, bias)
            g = MatMul (b, second)
            t = Tanh (g)
            z = MatMul (t, head)
        }""",
        first=weights(6, 2560), bias=weights(2560), second=weights(1280, 6), head=weights(6, 3),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    with pytest.raises(PlanError, match="neither ONNX Runtime nor ONNX's reference") as caught:
        go(program, images(4, 6), Looking())
    assert "BiasSplitGelu" in caught.value.where


def test_loops_and_branches_run_with_what_they_capture(tmp_path):
    model = graph(
        """m (float[1, 4, 6] x) => (float[1, 4, 3] z) {
            a = MatMul (x, first)
            s = ReduceSum <keepdims = 0> (x)
            zero = Constant <value = float {0.0}> ()
            c = Greater (s, zero)
            y = If (c) <
              then_branch = t () => (float[1, 4, 6] u) { u = Mul (a, double) },
              else_branch = e () => (float[1, 4, 6] v) { v = Neg (a) }>
            g = MatMul (y, second)
            t = Tanh (g)
            z = MatMul (t, head)
        }""",
        first=weights(6, 6), double=np.float32(2), second=weights(6, 6, seed=1),
        head=weights(6, 3),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    data = [{"x": np.abs(weights(1, 4, 6))}, {"x": -np.abs(weights(1, 4, 6))}]
    seen = Looking()
    go(program, data, seen)
    wanted = [d["x"] @ weights(6, 6) * k for d, k in zip(data, (2, -1), strict=True)]
    expected = np.concatenate(wanted).reshape(-1, 6)
    np.testing.assert_allclose(seen.observers["second"][0].rows.numpy(), expected, atol=1e-5)
