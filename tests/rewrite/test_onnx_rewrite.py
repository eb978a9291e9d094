"""Slim ONNX models against numbers from sliced weights, worked out without our masked oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onnx_graphs import (
    agree,
    attribute,
    graph,
    initialisers,
    operators,
    weights,
)

KEEP = [0, 2, 3, 6]  # of 8
X = weights(4, 5, seed=9)
IMAGE = weights(2, 3, 6, 6, seed=9)


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def conv(x, weight, bias=None, **options):
    w = torch.from_numpy(np.ascontiguousarray(weight))
    b = None if bias is None else torch.from_numpy(np.ascontiguousarray(bias))
    return F.conv2d(torch.from_numpy(np.ascontiguousarray(x)), w, b, **options).numpy()


def test_matmul(tmp_path):
    a, b, c = weights(5, 8), weights(8), weights(8, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  i = Add(h, b)  j = Relu(i)  y = MatMul(j, c) }""",
        a=a,
        b=b,
        c=c,
    )
    wanted = relu(X @ a[:, KEEP] + b[KEEP]) @ c[KEEP]
    slim = agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X)
    found = initialisers(slim)
    np.testing.assert_array_equal(found["a"], a[:, KEEP])
    np.testing.assert_array_equal(found["b"], b[KEEP])
    np.testing.assert_array_equal(found["c"], c[KEEP])


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_gemm_with_transposed_operands(tmp_path, opset):
    a, b, c, d = weights(8, 5), weights(8), weights(3, 8), weights(3)
    model = graph(
        """g (float[4,5] x) => (float[3,4] y) {
        h = Gemm<transB = 1, alpha = 2.0>(x, a, b)  i = Relu(h)
        t = Gemm<transA = 1, transB = 1>(ct, i)
        y = Add(t, e) }""",
        opset=opset,
        a=a,
        b=b,
        ct=np.ascontiguousarray(c.T),
        e=d[:, None],
    )
    hidden = relu(2 * X @ a[KEEP].T + b[KEEP])
    wanted = c[:, KEEP] @ hidden.T + d[:, None]
    agree(model, tmp_path, {("a", 0): KEEP}, [wanted], x=X)


def test_conv_batch_norm_and_groups(tmp_path):
    a, scale, shift, mean = weights(8, 3, 3, 3), weights(8), weights(8, seed=1), weights(8, seed=2)
    var = np.abs(weights(8, seed=3)) + 0.5
    b, c = weights(8, 2, 3, 3), weights(4, 8, 1, 1)  # b: 4 groups of 2
    model = graph(
        """g (float[N,3,6,6] x) => (float[N,4,6,6] y) {
        h = Conv<pads = [1,1,1,1]>(x, a)
        n = BatchNormalization(h, scale, shift, mean, var)  r = Relu(n)
        i = Conv<group = 4, pads = [1,1,1,1]>(r, b)
        y = Conv(i, c) }""",
        a=a,
        scale=scale,
        shift=shift,
        mean=mean,
        var=var,
        b=b,
        c=c,
    )
    groups = [0, 2, 3]
    rows = [2 * g + i for g in groups for i in (0, 1)]
    h = conv(IMAGE, a[rows], padding=1)
    s, t, m, v = (z[rows][:, None, None] for z in (scale, shift, mean, var))
    r = relu((h - m) / np.sqrt(v + 1e-5) * s + t)
    wanted = conv(conv(r, b[rows], padding=1, groups=3), c[:, rows])
    slim = agree(model, tmp_path, {("b", 0, 4): groups}, [wanted], x=IMAGE)
    assert attribute(operators(slim, "Conv")[1], "group") == 3


def test_depthwise(tmp_path):
    a, b, bias, c = weights(8, 3, 1, 1), weights(8, 1, 3, 3), weights(8), weights(2, 8, 1, 1)
    model = graph(
        """g (float[N,3,6,6] x) => (float[N,2,4,4] y) {
        h = Conv(x, a)  i = Conv<group = 8>(h, b, bias)  y = Conv(i, c) }""",
        a=a,
        b=b,
        bias=bias,
        c=c,
    )
    middle = conv(conv(IMAGE, a[KEEP]), b[KEEP], bias[KEEP], groups=4)
    slim = agree(model, tmp_path, {("a", 0): KEEP}, [conv(middle, c[:, KEEP])], x=IMAGE)
    assert attribute(operators(slim, "Conv")[1], "group") == 4


@pytest.mark.parametrize("groups", [1, 4])
def test_conv_transpose(tmp_path, groups):
    a, b, c = weights(8, 3, 1, 1), weights(8, 8 // groups, 2, 2), weights(2, 8, 1, 1)
    model = graph(
        f"""g (float[N,3,6,6] x) => (float[N,2,12,12] y) {{
        h = Conv(x, a)  i = ConvTranspose<group = {groups}, strides = [2,2]>(h, b)
        y = Conv(i, c) }}""",
        a=a,
        b=b,
        c=c,
    )
    if groups == 1:
        kept, rows, out, left = {("b", 0): KEEP, ("b", 1): [1, 4]}, KEEP, [1, 4], 1
        sliced = b[KEEP][:, [1, 4]]
    else:
        kept, left = {("b", 0, 4): [1, 3]}, 2
        rows = out = [2, 3, 6, 7]
        sliced = b[rows]
    up = F.conv_transpose2d(
        torch.from_numpy(conv(IMAGE, a[rows])), torch.from_numpy(sliced), stride=2, groups=left
    ).numpy()
    agree(model, tmp_path, kept, [conv(up, c[:, out])], x=IMAGE)


def recurrent(cell, gates, extra="", outputs="h, last"):
    w, r, b = weights(1, gates * 8, 5), weights(1, gates * 8, 8), weights(1, 2 * gates * 8)
    c = weights(8, 3)
    model = graph(
        f"""g (float[6,N,5] x) => (float[6,N,3] y) {{
        {outputs} = {cell}<hidden_size = 8{extra}>(x, w, r, b)
        axes = Constant<value = int64[1] {{1}}>()
        s = Squeeze(h, axes)  y = MatMul(s, c) }}""",
        w=w,
        r=r,
        b=b,
        c=c,
    )
    k = np.array(KEEP)
    rows = np.concatenate([8 * g + k for g in range(gates)])
    both = np.concatenate([rows, gates * 8 + rows])
    return model, w[0][rows], r[0][rows][:, k], b[0][both], c[k]


STEPS = weights(6, 2, 5, seed=9)


def test_lstm(tmp_path):
    model, w, r, b, c = recurrent("LSTM", 4)
    h = m = np.zeros((2, 4), np.float32)
    wanted = []
    for x in STEPS:
        gates = x @ w.T + h @ r.T + b[:16] + b[16:]
        i, o, f, g = np.split(gates, 4, axis=1)
        m = sigmoid(f) * m + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(m)
        wanted.append(h @ c)
    slim = agree(model, tmp_path, {("r", 2): KEEP}, [np.stack(wanted)], x=STEPS)
    assert attribute(operators(slim, "LSTM")[0], "hidden_size") == 4


@pytest.mark.parametrize("before", [0, 1])
def test_gru(tmp_path, before):
    model, w, r, b, c = recurrent("GRU", 3, f", linear_before_reset = {before}")
    (wz, wr, wh), (rz, rr, rh) = np.split(w, 3), np.split(r, 3)
    bz, br, bh, cz, cr, ch = np.split(b, 6)
    h = np.zeros((2, 4), np.float32)
    wanted = []
    for x in STEPS:
        z = sigmoid(x @ wz.T + h @ rz.T + bz + cz)
        reset = sigmoid(x @ wr.T + h @ rr.T + br + cr)
        state = reset * (h @ rh.T + ch) if before else (reset * h) @ rh.T + ch
        h = (1 - z) * np.tanh(x @ wh.T + state + bh) + z * h
        wanted.append(h @ c)
    agree(model, tmp_path, {("r", 2): KEEP}, [np.stack(wanted)], x=STEPS)


def test_plain_recurrence_whose_activation_is_not_zero_at_zero(tmp_path):
    model, w, r, b, c = recurrent("RNN", 1, ', activations = ["Sigmoid"]')
    h = np.zeros((2, 4), np.float32)
    wanted = []
    for x in STEPS:
        h = sigmoid(x @ w.T + h @ r.T + b[:4] + b[4:])
        wanted.append(h @ c)
    agree(model, tmp_path, {("r", 2): KEEP}, [np.stack(wanted)], x=STEPS)


SPLITS = {
    "equal, no sizes": (11, "Split<axis = -1>(h)", [4, 4]),
    "sizes as an attribute": (11, "Split<axis = -1, split = [3, 5]>(h)", [3, 5]),
    "equal, opset 13": (13, "Split<axis = -1>(h)", [4, 4]),
    "sizes as an input": (13, "Split<axis = -1>(h, sizes)", [3, 5]),
    "num_outputs": (18, "Split<axis = -1, num_outputs = 2>(h)", [4, 4]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_split(tmp_path, name):
    opset, call, sizes = SPLITS[name]
    a, b, c = weights(5, 8), weights(sizes[0], 3), weights(sizes[1], 3)
    arrays = {"sizes": np.array(sizes)} if "sizes)" in call else {}
    model = graph(
        f"""g (float[N,5] x) => (float[N,3] y) {{
        h = MatMul(x, a)  p, q = {call}
        i = MatMul(p, b)  j = MatMul(q, c)  y = Add(i, j) }}""",
        opset=opset,
        a=a,
        b=b,
        c=c,
        **arrays,
    )
    p, q = [0, 2], [1]
    columns = [*p, sizes[0] + 1]
    h = X @ a[:, columns]
    wanted = h[:, :2] @ b[p] + h[:, 2:] @ c[q]
    agree(model, tmp_path, {("b", 0): p, ("c", 0): q}, [wanted], x=X)


def test_split_of_shared_width(tmp_path):
    """Both halves multiply each other, so they lose the same columns: a gate."""
    a, c = weights(5, 8), weights(4, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  p, q = Split<axis = 1, num_outputs = 2>(h)
        s = Sigmoid(p)  m = Mul(s, q)  y = MatMul(m, c) }""",
        opset=18,
        a=a,
        c=c,
    )
    h = X @ a[:, [1, 2, 5, 6]]
    wanted = (sigmoid(h[:, :2]) * h[:, 2:]) @ c[[1, 2]]
    agree(model, tmp_path, {("c", 0): [1, 2]}, [wanted], x=X)


SLICES = {
    "from the front": ([0], [3], [1], slice(0, 3)),
    "from the back": ([-3], [2**31 - 1], [1], slice(-3, None)),
    "the middle": ([2], [-2], [1], slice(2, -2)),
    "every second": ([0], [8], [2], slice(0, None, 2)),
    "every second from the second": ([-7], [8], [2], slice(1, None, 2)),
}


@pytest.mark.parametrize("name", SLICES)
def test_slice(tmp_path, name):
    starts, ends, steps, places = SLICES[name]
    a = weights(5, 8)
    c = weights(len(range(8)[places]), 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y, float[N,2] z) {
        h = MatMul(x, a)  s = Slice(h, starts, ends, axes, steps)
        y = MatMul(s, c)  z = MatMul(h, d) }""",
        a=a,
        c=c,
        d=weights(8, 2),
        starts=np.array(starts),
        ends=np.array(ends),
        axes=np.array([-1]),
        steps=np.array(steps),
    )
    stay = [0, 2]
    columns = np.arange(8)[places][stay]
    if steps == [2]:  # pairs of columns leave together
        rest = [i for i in range(8) if i // 2 in stay]
    else:
        rest = [i for i in range(8) if i in columns or i not in range(8)[places]]
    wanted = [X @ a[:, columns] @ c[stay], X @ a[:, rest] @ weights(8, 2)[rest]]
    agree(model, tmp_path, {("c", 0): stay}, wanted, x=X)


def test_reversed(tmp_path):
    a, c = weights(5, 8), weights(8, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  s = Slice(h, starts, ends, axes, steps)  y = MatMul(s, c) }""",
        a=a,
        c=c,
        starts=np.array([7]),
        ends=np.array([-(2**31)]),
        axes=np.array([1]),
        steps=np.array([-1]),
    )
    wanted = (X @ a[:, KEEP])[:, ::-1] @ c[sorted(7 - k for k in KEEP)]
    agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X)


def test_concat_and_pad(tmp_path):
    a, b, c = weights(5, 8), weights(5, 4), weights(15, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  i = MatMul(x, b)  j = Concat<axis = 1>(h, i)
        p = Pad(j, pads, one)  y = MatMul(p, c) }""",
        a=a,
        b=b,
        c=c,
        pads=np.array([0, 1, 0, 2]),
        one=np.array(1.5, np.float32),
    )
    rows = [0, *(1 + k for k in KEEP), 9 + 1, 9 + 3, 13, 14]
    joined = np.concatenate([X @ a[:, KEEP], X @ b[:, [1, 3]]], axis=1)
    wanted = np.pad(joined, [(0, 0), (1, 2)], constant_values=1.5) @ c[rows]
    agree(model, tmp_path, {("a", 1): KEEP, ("b", 1): [1, 3]}, [wanted], x=X)


def test_pad_of_named_axes(tmp_path):
    a, c = weights(5, 8), weights(11, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  p = Pad(h, pads, "", axes)  y = MatMul(p, c) }""".replace('""', ""),
        opset=18,
        a=a,
        c=c,
        pads=np.array([2, 1]),
        axes=np.array([-1]),
    )
    wanted = X @ a[:, KEEP] @ c[[2 + k for k in KEEP]]
    agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X)


def test_tile(tmp_path):
    a, c = weights(5, 8), weights(16, 3)
    model = graph(
        """g (float[N,5] x) => (float[N,3] y) {
        h = MatMul(x, a)  t = Tile(h, repeats)  y = MatMul(t, c) }""",
        a=a,
        c=c,
        repeats=np.array([1, 2]),
    )
    h = X @ a[:, KEEP]
    wanted = np.concatenate([h, h], axis=1) @ c[KEEP + [8 + k for k in KEEP]]
    agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X)


def test_resize_whose_sizes_hold_the_channels(tmp_path):
    a, c = weights(8, 3, 1, 1), weights(2, 8, 1, 1)
    model = graph(
        """g (float[N,3,6,6] x) => (float[N,2,12,12] y) {
        h = Conv(x, a)  s = Shape<end = 2>(h)  z = Concat<axis = 0>(s, space)
        i = Resize<mode = "nearest">(h, , , z)  y = Conv(i, c) }""",
        a=a,
        c=c,
        space=np.array([12, 12]),
    )
    up = conv(IMAGE, a[KEEP]).repeat(2, axis=2).repeat(2, axis=3)
    agree(model, tmp_path, {("a", 0): KEEP}, [conv(up, c[:, KEEP])], x=IMAGE)


def test_resize_of_named_axes(tmp_path):
    a, c = weights(8, 3, 1, 1), weights(2, 8, 1, 1)
    model = graph(
        """g (float[N,3,6,6] x) => (float[N,2,12,12] y) {
        h = Conv(x, a)
        i = Resize<mode = "nearest", axes = [2, 3]>(h, , , space)  y = Conv(i, c) }""",
        opset=18,
        a=a,
        c=c,
        space=np.array([12, 12]),
    )
    up = conv(IMAGE, a[KEEP]).repeat(2, axis=2).repeat(2, axis=3)
    agree(model, tmp_path, {("a", 0): KEEP}, [conv(up, c[:, KEEP])], x=IMAGE)
