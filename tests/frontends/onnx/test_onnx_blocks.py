"""Weights in blocks: packed ones of MatMulNBits, and those of a blockwise DequantizeLinear."""

from __future__ import annotations

from math import ceil

import numpy as np
import onnx
import pytest
from onnx import helper

from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx.shapes.quantised import unpacked
from onnx_graphs import graph, initialisers, pruned, weights, written
from onnx_quantised import RUNTIME, exactly, packed

KEEP = [1, 2, 5]  # of 8


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_weights_are_what_the_runtime_multiplies_by(tmp_path, bits, symmetric):
    model = graph("g (float[N,64] x) => (float[N,8] y) { y = MatMul(x, w) }", w=weights(64, 8))
    file = packed(model, tmp_path, bits=bits, symmetric=symmetric)
    program = load_onnx(file)
    (name,) = program.trainable
    (wanted,) = exactly(file, x=np.eye(64, dtype=np.float32))
    blocks = program.weights[name].numpy()
    assert blocks.shape == (8, 4, 16)
    np.testing.assert_allclose(blocks.reshape(8, 64).T, wanted, rtol=1e-5, atol=1e-6)
    assert program.costs.total().params == 64 * 8


def test_numbers_that_share_bytes():
    stored = np.array([[0b11100100, 0b00011011]], np.uint8)
    assert unpacked(stored, 2).tolist() == [[0, 1, 2, 3, 3, 2, 1, 0]]
    assert unpacked(stored, 4).tolist() == [[4, 14, 11, 1]]


def nbits(columns=8, inner=32, block=16, bits=4, zeros=None, order=None, bias=None, **more):
    """A float layer, then one of packed weights ``[columns, inner]``."""
    rng = np.random.default_rng(1)
    blocks = ceil(inner / block)
    arrays = {
        "a": weights(5, inner),
        "w": rng.integers(0, 255, (columns, blocks, block * bits // 8)).astype(np.uint8),
        "s": np.abs(weights(columns, blocks)),
    }
    arrays |= {n: v for n, v in (("z", zeros), ("o", order), ("b", bias)) if v is not None}
    inputs = ["h", "w", "s", "z" if zeros is not None else ""]
    inputs += ["o" if order is not None else "", "b" if bias is not None else ""]
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        ["m"],
        domain=RUNTIME,
        K=inner,
        N=columns,
        bits=bits,
        block_size=block,
        **more,
    )
    model = graph(
        "g (float[N,5] x) => (float[N,4] y) { h = MatMul(x, a)  y = MatMul(m, c) }",
        a=arrays.pop("a"),
        c=weights(columns, 4),
        **arrays,
    )
    model.graph.node.insert(1, node)
    model.opset_import.append(helper.make_opsetid(RUNTIME, 1))
    return model


def test_packed_columns_and_blocks(tmp_path):
    """Columns one by one with their bias, rows in whole blocks; attributes follow."""
    model = nbits(inner=64, bias=weights(8))
    slim = pruned(model, tmp_path, {("w", 0): KEEP, ("w", 1): [0, 3]})
    dense, cut = initialisers(model), initialisers(onnx.load(slim))
    np.testing.assert_array_equal(cut["w"], dense["w"][KEEP][:, [0, 3]])
    np.testing.assert_array_equal(cut["s"], dense["s"][KEEP][:, [0, 3]])
    np.testing.assert_array_equal(cut["b"], dense["b"][KEEP])
    places = [*range(16), *range(48, 64)]
    np.testing.assert_array_equal(cut["a"], dense["a"][:, places])
    (node,) = (n for n in onnx.load(slim).graph.node if n.op_type == "MatMulNBits")
    sizes = {a.name: a.i for a in node.attribute}
    assert (sizes["K"], sizes["N"]) == (32, 3)


def test_zero_points_of_four_bits_go_in_pairs(tmp_path):
    zeros = np.random.default_rng(2).integers(0, 255, (8, 2)).astype(np.uint8)
    slim = pruned(nbits(inner=64, zeros=zeros), tmp_path, {("w", 0): KEEP, ("z", 1): [1]})
    cut = initialisers(onnx.load(slim))
    np.testing.assert_array_equal(cut["z"], zeros[KEEP][:, [1]])
    assert cut["w"].shape == (3, 2, 8)


def test_zero_points_that_are_floats_have_one_a_block(tmp_path):
    zeros = 8 + weights(8, 4)
    slim = pruned(nbits(inner=64, zeros=zeros), tmp_path, {("w", 0): KEEP, ("w", 1): [0, 2, 3]})
    np.testing.assert_array_equal(initialisers(onnx.load(slim))["z"], zeros[KEEP][:, [0, 2, 3]])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nbits(inner=40), "the last is shorter"),
        (nbits(inner=48, zeros=np.full((8, 2), 120, np.uint8)), "share a byte"),
        (nbits(inner=32, order=np.repeat([1, 0], 16).astype(np.int32)), "in another order"),
        (nbits(inner=32, bits=8, weight_prepacked=1), "in a layout of some device"),
    ],
)
def test_rows_of_packed_weights_that_stay(tmp_path, model, why):
    program = load_onnx(written(model, tmp_path))
    assert why in program.frozen()["a", 1]
    columns = [s for s in program.structures if ("w", 0) in s.members and s.prunable]
    assert bool(columns) == ("device" not in why)


def test_blocks_of_which_the_last_is_shorter(tmp_path):
    model = graph(
        """g (float[N,5] x) => (float[N,8] y) {
        h = MatMul(x, a)  d = DequantizeLinear<axis = 0, block_size = 16>(w, s)
        y = MatMul(h, d) }""",
        opset=21,
        ir_version=10,
        a=weights(5, 40),
        w=np.random.default_rng(0).integers(-128, 127, (40, 8)).astype(np.int8),
        s=np.abs(weights(3, 8)),
    )
    program = load_onnx(written(model, tmp_path))
    assert "quantised in blocks, of which the last is shorter" in program.frozen()["a", 1]
    assert program.weights["w"].shape == (40, 8)


def test_blocks_of_eight_bits_go_as_a_whole(tmp_path):
    model = graph(
        """g (float[N,5] x) => (float[N,4] y) {
        h = MatMul(x, a)  d = DequantizeLinear<axis = 0, block_size = 4>(w, s, z)
        m = MatMul(h, d)  y = MatMul(m, c) }""",
        opset=21,
        ir_version=10,
        a=weights(5, 12),
        w=np.random.default_rng(0).integers(-128, 127, (12, 8)).astype(np.int8),
        s=np.abs(weights(3, 8)),
        z=np.random.default_rng(1).integers(-9, 9, (3, 8)).astype(np.int8),
        c=weights(8, 4),
    )
    slim = pruned(model, tmp_path, {("w", 1): KEEP, ("s", 0): [0, 2]})
    cut, dense = initialisers(onnx.load(slim)), initialisers(model)
    places = [0, 1, 2, 3, 8, 9, 10, 11]
    np.testing.assert_array_equal(cut["w"], dense["w"][places][:, KEEP])
    np.testing.assert_array_equal(cut["z"], dense["z"][[0, 2]][:, KEEP])
