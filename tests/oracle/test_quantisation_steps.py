"""The proof for quantised models: between two roundings nothing is let pass."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphprune.errors import VerifyError
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx.ort import saturates
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, initialisers, planned, weights, written
from onnx_quantised import dynamic, static, transformer

KEEP = [0, 1, 4, 6, 7]  # of 8


def changed(file, name, change):
    """A file in which one tensor is another."""
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = onnx.numpy_helper.to_array(tensor).copy()
            change(values)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, file)


def slim_of(file, kept, folder):
    program = load_onnx(file)
    plan = planned(program, kept)
    SlimOnnx(program, plan).save(folder / "slim.onnx")
    return program, plan, folder / "slim.onnx"


def normalised(width=512):
    """A norm over a pruned axis: its formula in the masked model rounds otherwise."""
    rng = np.random.default_rng(0)
    return graph(
        """g (float[64,16] x) => (float[64,8] y) {
        h = MatMul(x, a)  n = LayerNormalization<axis = -1>(h, g, b)
        q = QuantizeLinear(n, s, z)  d = DequantizeLinear(q, s, z)
        w = DequantizeLinear(v, vs)  m = MatMul(d, w)
        mq = QuantizeLinear(m, ms, z)  y = DequantizeLinear(mq, ms, z) }""",
        a=weights(16, width),
        g=1 + 0.1 * weights(width),
        b=0.1 * weights(width),
        v=rng.integers(-128, 127, (width, 8)).astype(np.int8),
        vs=np.float32(0.01),
        s=np.float32(1e-4),
        z=np.int16(0),
        ms=np.float32(1e-3),
    )


def sixteen(model):
    model.opset_import[0].version = 21
    model.ir_version = 10
    return model


def test_rounding_is_no_difference(tmp_path):
    """Thousands of numbers are close to the boundary of a step, and some end on either side."""
    file = written(sixteen(normalised()), tmp_path)
    program, plan, slim = slim_of(file, {("a", 1): list(range(100, 477))}, tmp_path)
    certificate = verify_onnx(program, plan, slim)
    certificate.raise_if_failed()
    assert certificate.steps == 2
    assert certificate.drift > 1e-4  # what a comparison in one piece would have called a mistake
    assert certificate.max_abs_error < 1e-4


@pytest.mark.parametrize("name", ["wu_quantized", "bu_quantized", "wd_scale", "n_scale"])
def test_the_smallest_change_fails(tmp_path, name):
    """One integer of one weight by one step, a bias, a scale by a hundredth."""
    file = static(transformer, tmp_path)
    program, plan, slim = slim_of(file, {("wu_quantized", 1): list(range(0, 128, 2))}, tmp_path)
    assert verify_onnx(program, plan, slim).passed

    def change(values):
        if values.dtype == np.float32:
            values *= 1.01
        else:
            values.reshape(-1)[3] += 1 if values.dtype == np.int8 else 40

    changed(slim, name, change)
    certificate = verify_onnx(program, plan, slim)
    assert not certificate.passed
    assert "quantises" in certificate.failed_output


@pytest.mark.parametrize("saturates", [True, False])
@pytest.mark.parametrize(("quantised", "of_bytes"), [(static, False), (dynamic, True)])
def test_a_processor_without_vnni_is_named(tmp_path, monkeypatch, quantised, of_bytes, saturates):
    file = quantised(transformer, tmp_path)
    program, plan, slim = slim_of(file, {("wu_quantized", 1): list(range(64))}, tmp_path)
    monkeypatch.setattr("graphprune.oracle.verification_onnx.saturates", lambda: saturates)
    verify_onnx(program, plan, slim).raise_if_failed()

    def change(values):
        values += 40

    changed(slim, "wd_quantized", change)
    with pytest.raises(VerifyError) as error:
        verify_onnx(program, plan, slim).raise_if_failed()
    assert ("reduce_range" in error.value.hint) == (of_bytes and saturates)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="other processors multiply otherwise",
)
def test_what_a_processor_has():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert saturates() == ("vnni" not in flags)


def test_a_model_cut_at_other_places_fails(tmp_path):
    file = static(transformer, tmp_path)
    program, plan, slim = slim_of(file, {("wu_quantized", 1): list(range(64))}, tmp_path)
    whole = initialisers(onnx.load(file))["wd_quantized"]

    def change(values):
        values[:] = whole[64:]

    changed(slim, "wd_quantized", change)
    assert not verify_onnx(program, plan, slim).passed


def test_a_model_of_another_size_fails(tmp_path):
    file = static(transformer, tmp_path)
    program, plan, _ = slim_of(file, {("wu_quantized", 1): list(range(64))}, tmp_path)
    other = planned(program, {("wu_quantized", 1): list(range(32))})
    certificate = verify_onnx(program, plan, SlimOnnx(program, other))
    assert not certificate.passed
    assert "doesn't run on the masked model's numbers" in certificate.problem


def fine(offset):
    """Numbers of a thousandth, in steps of a hundred thousandth."""
    return graph(
        """g (float[32,5] x) => (float[32,3] y) {
        m = MatMul(x, a)  h = Add(m, b)  q = QuantizeLinear(h, s, z)
        d = DequantizeLinear(q, s, z)  y = MatMul(d, c) }""",
        a=3e-4 * weights(5, 8),
        b=np.full(8, offset, np.float32),
        s=np.float32(1e-5),
        z=np.uint8(128),
        c=weights(8, 3),
    )


@pytest.mark.parametrize(("offset", "passes"), [(0.0, True), (3e-5, False)])
def test_no_more_than_half_a_step_passes(tmp_path, offset, passes):
    """Three steps are less than a ten-thousandth, and still wrong."""
    file = written(fine(0.0), tmp_path)
    program = load_onnx(file)
    plan = planned(program, {("a", 1): KEEP})
    changed_file = written(fine(offset), tmp_path, "changed.onnx")
    other = load_onnx(changed_file)
    slim = SlimOnnx(other, planned(other, {("a", 1): KEEP}))
    slim.save(tmp_path / "slim.onnx")
    certificate = verify_onnx(program, plan, tmp_path / "slim.onnx")
    assert certificate.passed == passes
    assert certificate.steps == 1


def test_what_is_beyond_the_range_of_a_step_makes_no_difference(tmp_path):
    """Numbers of 1e30, such as masks, would make any other difference look small."""
    model = graph(
        """g (float[32,5] x) => (float[32,3] y) {
        m = MatMul(x, a)  h = Add(m, b)  q = QuantizeLinear(h, s, z)
        d = DequantizeLinear(q, s, z)  y = MatMul(d, c) }""",
        a=weights(5, 8),
        b=np.array([0, -1e30, 0, 0, 0, 0, 0, 0], np.float32),
        s=np.float32(0.05),
        z=np.uint8(128),
        c=weights(8, 3),
    )
    program, plan, slim = slim_of(written(model, tmp_path), {("a", 1): KEEP}, tmp_path)
    certificate = verify_onnx(program, plan, slim)
    certificate.raise_if_failed()
    assert certificate.max_abs_error < 1e-4

    def change(values):
        values[0, 0] += 0.01

    changed(slim, "a", change)
    assert not verify_onnx(program, plan, slim).passed
