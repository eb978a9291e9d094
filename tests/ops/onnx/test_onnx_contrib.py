"""ONNX Runtime's own attention operators, pruned in every role, against numbers in float64."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx.feeds import random_feeds
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import agree, attribute, fused, initialisers, operators, planned, weights, written

HEADS, QK, V = 4, 6, 5
X = weights(2, 5, 7, seed=9)


def split(x, heads):
    """``[batch, length, heads * dim]`` as ``[batch, heads, length, dim]``, in float64."""
    return x.astype(np.float64).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attend(q, k, v, scale, bias=0.0):
    """Attention on ``[batch, heads, length, dim]``; the result is ``[batch, length, width]``."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, repeats, axis=1) for x in (k, v))
    out = softmax(q @ k.swapaxes(-1, -2) * scale + bias) @ v
    return out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1)


def causal(rows, columns):
    return np.where(np.arange(columns) > np.arange(rows)[:, None] + columns - rows, -np.inf, 0.0)


def columns(heads, dims, width, start=0):
    """Places of a width of ``heads * dim`` that belong to some heads and dims of each."""
    return np.array([start + h * width + d for h in heads for d in dims])


# What is kept of 4 heads, 6 dims of queries and keys, and 5 of values.
ROLES = {
    "heads": ([0, 3], range(QK), range(V)),
    "qk": (range(HEADS), [0, 2, 3], range(V)),
    "v": (range(HEADS), range(QK), [1, 4]),
    "all": ([1, 2, 3], [0, 5], [0, 2, 3]),
}


def chosen(role, weight):
    """The plan, and the columns of queries and of values that stay."""
    heads, qk, v = map(list, ROLES[role])
    kept = {(weight, HEADS): (heads, HEADS), (weight, QK): (qk, QK), (weight, V): (v, V)}
    plan = {(weight, 1, size): rows for (_, size), (rows, n) in kept.items() if len(rows) < n}
    return plan, columns(heads, qk, QK), columns(heads, v, V), len(heads)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_on_one_input(tmp_path, role, scale):
    """All inputs but the cache: a bias, a mask of tokens and one of scores for every head."""
    w, b, o = weights(7, 68), weights(68), weights(20, 3)
    bias = weights(1, HEADS, 5, 5)
    given = "" if scale is None else f", scale = {scale}"
    model = fused(
        f"""g (float[2,5,7] x, int32[2,5] mask) => (float[2,5,3] y) {{
        a = ort.Attention<num_heads = 4, unidirectional = 1, qkv_hidden_sizes = [24,24,20]
            {given}>(x, w, b, mask, "", bias)
        y = MatMul(a, o) }}""",
        w=w,
        b=b,
        o=o,
        bias=bias,
    )
    plan, qk, v, n = chosen(role, "w")
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], np.int32)
    q, k, values = (split(X @ w[:, c] + b[c], n) for c in (qk, 24 + qk, 48 + v))
    hidden = np.where(mask == 0, -np.inf, 0.0)[:, None, None]
    scores = causal(5, 5) + hidden + bias[:, list(ROLES[role][0])]
    wanted = attend(q, k, values, scale or 1 / math.sqrt(QK), scores) @ o[v]
    slim = agree(model, tmp_path, plan, [wanted], x=X, mask=mask)
    (node,) = operators(slim, "Attention")
    assert attribute(node, "num_heads") == n
    assert attribute(node, "qkv_hidden_sizes") == [len(qk), len(qk), len(v)]
    assert initialisers(slim)["bias"].shape == (1, n, 5, 5)


@pytest.mark.parametrize("what", ["heads", "v"])
def test_attention_of_equal_widths(tmp_path, what):
    """Widths are written out as soon as they differ, and only then."""
    w, o = weights(7, 36), weights(12, 3)
    model = fused(
        """g (float[2,5,7] x) => (float[2,5,3] y) {
        a = ort.Attention<num_heads = 3>(x, w)  y = MatMul(a, o) }""",
        w=w,
        o=o,
    )
    heads, dims = ([0, 2], range(4)) if what == "heads" else (range(3), [0, 1, 3])
    qk = columns(heads, range(4), 4)
    v = columns(heads, dims, 4)
    q, k, values = (split(X @ w[:, c], len(heads)) for c in (qk, 12 + qk, 24 + v))
    wanted = attend(q, k, values, 0.5) @ o[v]
    plan = {("o", 0, 3): heads} if what == "heads" else {("o", 0, 4): dims}
    slim = agree(model, tmp_path, plan, [wanted], x=X)
    found = {a.name for a in operators(slim, "Attention")[0].attribute}
    assert found == ({"num_heads"} if what == "heads" else {"num_heads", "qkv_hidden_sizes"})


@pytest.mark.parametrize("what", ["heads", "dims"])
def test_attention_with_a_cache(tmp_path, what):
    """Keys and values of a cache are of the widths of those that come to it."""
    w, o = weights(7, 72), weights(24, 3)
    past = weights(2, 2, HEADS, 3, QK)
    model = fused(
        """g (float[2,5,7] x) => (float[2,5,3] y, float[2,2,8] z) {
        a, p = ort.Attention<num_heads = 4, unidirectional = 1>(x, w, "", "", past)
        y = MatMul(a, o)  z = ReduceSum<keepdims = 0>(p, axes) }""",
        w=w,
        o=o,
        past=past,
        axes=np.array([2, 4]),
    )
    heads, dims = ([0, 2, 3], range(QK)) if what == "heads" else (range(HEADS), [0, 1, 4])
    c = columns(heads, dims, QK)
    q, k, v = (split(X @ w[:, c + i], len(heads)) for i in (0, 24, 48))
    old = past[:, :, list(heads)][..., list(dims)].astype(np.float64)
    k, v = np.concatenate([old[0], k], axis=2), np.concatenate([old[1], v], axis=2)
    wanted = attend(q, k, v, 1 / math.sqrt(QK), causal(5, 8)) @ o[c]
    present = np.stack([k, v]).sum(axis=(2, 4))
    plan = {("o", 0, 4): heads} if what == "heads" else {("o", 0, 6): dims}
    agree(model, tmp_path, plan, [wanted, present], x=X)


def test_attention_in_a_wide_stream(tmp_path):
    """Its input and what it gives have nothing to do with its heads."""
    a, w, o = weights(7, 8, seed=1), weights(8, 24), weights(8, 3)
    model = fused(
        """g (float[2,5,7] x) => (float[2,5,3] y) {
        h = MatMul(x, a)  t = ort.Attention<num_heads = 2>(h, w)  y = MatMul(t, o) }""",
        a=a,
        w=w,
        o=o,
    )
    kept = [0, 3, 4]
    q, k, v = (split(X @ a[:, kept] @ w[kept, i : i + 8], 2) for i in (0, 8, 16))
    agree(model, tmp_path, {("a", 1): kept}, [attend(q, k, v, 0.5) @ o], x=X)


@pytest.mark.parametrize("role", ROLES)
def test_multi_head_attention(tmp_path, role):
    """Queries of other places than keys and values, a bias of all three, a mask of tokens."""
    memory = weights(2, 4, 7, seed=8)
    wq, wk, wv, o = weights(7, 24), weights(7, 24, seed=1), weights(7, 20), weights(20, 3)
    b, bias = weights(68), weights(1, HEADS, 5, 4)
    model = fused(
        """g (float[2,5,7] x, float[2,4,7] m, int32[2,4] mask) => (float[2,5,3] y) {
        q = MatMul(x, wq)  k = MatMul(m, wk)  v = MatMul(m, wv)
        a = ort.MultiHeadAttention<num_heads = 4>(q, k, v, b, mask, bias)
        y = MatMul(a, o) }""",
        wq=wq,
        wk=wk,
        wv=wv,
        o=o,
        b=b,
        bias=bias,
    )
    plan, qk, v, n = chosen(role, "wq")
    plan = {("o", 0, size) if size == V else (w, d, size): r for (w, d, size), r in plan.items()}
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32)
    q = split(X @ wq[:, qk] + b[qk], n)
    k, values = split(memory @ wk[:, qk] + b[24 + qk], n), split(memory @ wv[:, v] + b[48 + v], n)
    scores = np.where(mask == 0, -np.inf, 0.0)[:, None, None] + bias[:, list(ROLES[role][0])]
    wanted = attend(q, k, values, 1 / math.sqrt(QK), scores) @ o[v]
    slim = agree(model, tmp_path, plan, [wanted], x=X, m=memory, mask=mask)
    (node,) = operators(slim, "MultiHeadAttention")
    assert attribute(node, "num_heads") == n
    assert len(initialisers(slim)["b"]) == 2 * len(qk) + len(v)


@pytest.mark.parametrize("what", ["heads", "dims"])
def test_multi_head_attention_with_a_cache(tmp_path, what):
    old = weights(2, HEADS, 3, QK), weights(2, HEADS, 3, QK, seed=1)
    w, o = [weights(7, 24, seed=i) for i in range(3)], weights(24, 3)
    model = fused(
        """g (float[2,5,7] x) => (float[2,5,3] y, float[2,8] z) {
        q = MatMul(x, w0)  k = MatMul(x, w1)  v = MatMul(x, w2)
        a, c, d = ort.MultiHeadAttention<num_heads = 4, unidirectional = 1>
            (q, k, v, "", "", "", pk, pv)
        y = MatMul(a, o)  e = Add(c, d)  z = ReduceSum<keepdims = 0>(e, axes) }""",
        w0=w[0],
        w1=w[1],
        w2=w[2],
        o=o,
        pk=old[0],
        pv=old[1],
        axes=np.array([1, 3]),
    )
    heads, dims = ([1, 2], range(QK)) if what == "heads" else (range(HEADS), [0, 1, 2, 4])
    c = columns(heads, dims, QK)
    q, k, v = (split(X @ x[:, c], len(heads)) for x in w)
    before = [p[:, list(heads)][..., list(dims)].astype(np.float64) for p in old]
    k, v = (np.concatenate(pair, axis=2) for pair in zip(before, (k, v), strict=True))
    wanted = attend(q, k, v, 1 / math.sqrt(QK), causal(5, 8)) @ o[c]
    plan = {("pk", 1): heads} if what == "heads" else {("pk", 3): dims, ("pv", 3): dims}
    agree(model, tmp_path, plan, [wanted, (k + v).sum(axis=(1, 3))], x=X)


def test_multi_head_attention_on_keys_by_heads(tmp_path):
    """Keys and values that another graph has computed, of ``[batch, heads, length, dim]``."""
    keys, values = weights(2, HEADS, 3, QK), weights(2, HEADS, 3, QK, seed=1)
    w, o = weights(7, 24), weights(24, 3)
    model = fused(
        """g (float[2,5,7] x) => (float[2,5,3] y) {
        q = MatMul(x, w)  a = ort.MultiHeadAttention<num_heads = 4>(q, k, v)
        y = MatMul(a, o) }""",
        w=w,
        o=o,
        k=keys,
        v=values,
    )
    heads, dims = [0, 1, 3], [0, 2, 3, 5]
    c = columns(heads, dims, QK)
    k, v = (x[:, heads].astype(np.float64) for x in (keys, values))
    wanted = attend(split(X @ w[:, c], 3), k[..., dims], v[..., dims], 1 / math.sqrt(QK)) @ o[c]
    plan = {("k", 1): heads, ("k", 3): dims, ("v", 3): dims}
    agree(model, tmp_path, plan, [wanted], x=X)


def rotated(x, positions, cos, sin, interleaved=False, part=None):
    """``[batch, heads, length, dim]`` with pairs turned by the angles of each place."""
    part = part or x.shape[-1]
    c, s = (a.astype(np.float64)[positions][:, None] for a in (cos, sin))
    a, b = (x[..., 0:part:2], x[..., 1:part:2]) if interleaved else (
        x[..., : part // 2], x[..., part // 2 : part]
    )  # fmt: skip
    real, other = a * c - b * s, a * s + b * c
    turned = np.stack([real, other], -1).reshape(*x.shape[:-1], part) if interleaved else (
        np.concatenate([real, other], -1)
    )  # fmt: skip
    return np.concatenate([turned, x[..., part:]], -1)


GROUPS = {"groups": ([1], [0, 1, 2]), "queries": ([0, 1], [0, 2]), "both": ([0], [1])}


@pytest.mark.parametrize("kept", GROUPS)
@pytest.mark.parametrize("packed", [False, True])
def test_grouped_queries(tmp_path, kept, packed):
    """2 groups of 3 queries of size 16, rotated inside; a cache of none yet, sinks, a bias."""
    groups, repeats = GROUPS[kept]
    heads = [3 * g + r for g in groups for r in repeats]
    w, o = weights(7, 160), weights(96, 3)
    cos, sin = np.cos(weights(6, 8)), np.sin(weights(6, 8))
    sink, bias = weights(6), weights(1, 6, 5, 5)
    apart = "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
    arrays = {"w": w} if packed else {"wq": w[:, :96], "wk": w[:, 96:128], "wv": w[:, 128:]}
    model = fused(
        f"""g (float[2,5,7] x) => (float[2,5,3] y, float[2,5] z) {{
        {"q = MatMul(x, w)" if packed else apart}
        a, c, d = ort.GroupQueryAttention<num_heads = 6, kv_num_heads = 2, do_rotary = 1>
            (q, {'"", ""' if packed else "k, v"}, "", "", last, total, cos, sin, "", bias, sink)
        y = MatMul(a, o)  e = Add(c, d)  z = ReduceSum<keepdims = 0>(e, axes) }}""",
        last=np.array([4, 4], np.int32),
        total=np.array([5], np.int32),
        cos=cos,
        sin=sin,
        sink=sink,
        bias=bias,
        o=o,
        axes=np.array([1, 3]),
        **{n: np.ascontiguousarray(a) for n, a in arrays.items()},
    )
    places = np.arange(5)[None].repeat(2, axis=0)
    cq, ck = columns(heads, range(16), 16), columns(groups, range(16), 16, 96)
    q = rotated(split(X @ w[:, cq], len(heads)), places, cos, sin)
    k = rotated(split(X @ w[:, ck], len(groups)), places, cos, sin)
    v = split(X @ w[:, ck + 32], len(groups))
    rows = [np.repeat(t, len(repeats), axis=1) for t in (k, v)]
    scores = q @ rows[0].swapaxes(-1, -2) / 4 + causal(5, 5) + bias[:, heads]
    extra = np.broadcast_to(sink[heads][:, None, None], (2, len(heads), 5, 1))
    shares = softmax(np.concatenate([scores, extra], axis=-1))[..., :-1]
    out = (shares @ rows[1]).swapaxes(1, 2).reshape(2, 5, -1)
    plan = {("sink", 0, 2): groups} if len(groups) < 2 else {}
    plan |= {("sink", 0, 3): repeats} if len(repeats) < 3 else {}
    wanted = [out @ o[cq], (k + v).sum(axis=(1, 3))]
    slim = agree(model, tmp_path, plan, wanted, x=X)
    (node,) = operators(slim, "GroupQueryAttention")
    assert attribute(node, "num_heads") == len(heads)
    assert attribute(node, "kv_num_heads") == len(groups)


def grouped_with_a_cache(
    sign="int64[2,4] i", body="s = ReduceSum<keepdims = 0>(i, last)  t = Sub(s, one)", total=None
):
    """6 queries for 2 keys of size 8; the place of the last token is computed from an input."""
    arrays = {"last": np.array([1]), "one": np.array([1])}
    return fused(
        f"""g (float[2,1,7] x, {sign}, float[2,2,3,8] pk, float[2,2,3,8] pv
            {f", {total}" if total else ""})
            => (float[2,1,3] y, float[2,2,4,8] c, float[2,2,4,8] d) {{
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  {body}  u = Cast<to = 6>(t)
        a, c, d = ort.GroupQueryAttention<num_heads = 6, kv_num_heads = 2>
            (q, k, v, pk, pv, u, total)
        y = MatMul(a, o) }}""",
        wq=weights(7, 48),
        wk=weights(7, 16),
        wv=weights(7, 16, seed=1),
        o=weights(48, 3),
        **({} if total else {"total": np.array([4], np.int32)}),
        **{n: a for n, a in arrays.items() if n in body},
    )


def test_grouped_queries_with_a_cache(tmp_path):
    """What a model takes and gives stays; each group may still lose queries."""
    arrays = {
        t.name: onnx.numpy_helper.to_array(t) for t in grouped_with_a_cache().graph.initializer
    }
    wq, wk, wv, o = (arrays[n] for n in ("wq", "wk", "wv", "o"))
    x, pk, pv = weights(2, 1, 7), weights(2, 2, 3, 8), weights(2, 2, 3, 8, seed=1)
    repeats = [0, 2]
    cq = columns([3 * g + r for g in (0, 1) for r in repeats], range(8), 8)
    k, v = (np.concatenate([p, split(x @ w, 2)], axis=2) for p, w in ((pk, wk), (pv, wv)))
    wanted = attend(split(x @ wq[:, cq], 4), k, v, 1 / math.sqrt(8)) @ o[cq]
    feeds = {"x": x, "i": np.ones((2, 4), np.int64), "pk": pk, "pv": pv}
    agree(grouped_with_a_cache(), tmp_path, {("wq", 1, 3): repeats}, [wanted, k, v], **feeds)
    program = load_onnx(written(grouped_with_a_cache(), tmp_path))
    reasons = {s.size: s.reason for s in program.structures if ("wq", 1) in s.members}
    assert "multiples of 8" in reasons[8]
    assert "model input" in reasons[2]


ROTARY = {
    "runtime": ("ort.RotaryEmbedding<{}>(h, places, cos, sin)", 17),
    "standard": ("RotaryEmbedding<{}>(h, cos, sin, places)", 23),
}


@pytest.mark.parametrize("domain", ROTARY)
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 8])
@pytest.mark.parametrize("flat", [True, False])
def test_rotary_embedding(tmp_path, domain, interleaved, part, flat):
    """3 heads of 8, or of 13 of which 8 are turned; as ``[batch, length, width]`` or by heads."""
    call, opset = ROTARY[domain]
    width = 13 if part else 8
    w, o = weights(7, 3 * width), weights(3 * width, 3)
    cos, sin = np.cos(weights(9, 4)), np.sin(weights(9, 4))
    options = f"interleaved = {interleaved}"
    if part or (flat and domain == "standard"):
        options += f", num_heads = 3, rotary_embedding_dim = {part}"
    before, after = "h = MatMul(x, w)", "y = MatMul(r, o)"
    if not flat:
        before = "m = MatMul(x, w)  n = Reshape(m, apart)  h = Transpose<perm = [0,2,1,3]>(n)"
        after = "t = Transpose<perm = [0,2,1,3]>(r)  u = Reshape(t, flat)  y = MatMul(u, o)"
    model = fused(
        f"""g (float[2,5,7] x, int64[2,5] places) => (float[2,5,3] y) {{
        {before}  r = {call.format(options)}  {after} }}""",
        opset=opset,
        w=w,
        o=o,
        cos=cos,
        sin=sin,
        **({} if flat else {"apart": np.array([0, 0, 3, width]), "flat": np.array([0, 0, -1])}),
    )
    heads, pairs, rest = [0, 2], [1, 2, 3], [8, 10, 12] if part else []
    halves = [i + p for i in (0, 4) for p in pairs]
    turned = [2 * p + i for p in pairs for i in (0, 1)] if interleaved else halves
    c = columns(heads, [*turned, *rest], width)
    places = np.array([[0, 1, 2, 3, 4], [3, 8, 4, 5, 6]])
    out = rotated(split(X @ w[:, c], 2), places, cos[:, pairs], sin[:, pairs], interleaved, 6)
    wanted = out.swapaxes(1, 2).reshape(2, 5, -1) @ o[c]
    plan = {("w", 1, 3): heads, ("cos", 1): pairs}
    plan |= {("w", 1, 5): [0, 2, 4]} if part else {}
    slim = agree(model, tmp_path, plan, [wanted], x=X, places=places)
    found = {a.name: a.i for a in operators(slim, "RotaryEmbedding")[0].attribute}
    assert found.get("num_heads", 2) == 2
    assert found.get("rotary_embedding_dim", 0) == (6 if part else 0)


def test_rotary_embedding_without_places(tmp_path):
    """Angles of every token, ``[batch, length, pairs]``."""
    w, o, cos, sin = weights(7, 24), weights(24, 3), weights(2, 5, 4), weights(2, 5, 4, seed=1)
    model = fused(
        """g (float[2,5,7] x) => (float[2,5,3] y) {
        h = MatMul(x, w)  r = RotaryEmbedding<num_heads = 3>(h, cos, sin)  y = MatMul(r, o) }""",
        opset=23,
        w=w,
        o=o,
        cos=cos,
        sin=sin,
    )
    heads, pairs = [1, 2], [0, 3]
    c = columns(heads, [0, 3, 4, 7], 8)
    places = np.arange(10).reshape(2, 5)
    angles = (a.reshape(10, 4)[:, pairs] for a in (cos, sin))
    out = rotated(split(X @ w[:, c], 2), places, *angles)
    wanted = out.swapaxes(1, 2).reshape(2, 5, -1) @ o[c]
    agree(model, tmp_path, {("w", 1, 3): heads, ("cos", 2): pairs}, [wanted], x=X)


LENGTHS = {
    # what is computed from an input, and what has to be in it, for a cache of 3 and one more
    "mask": (
        "int64[2,4] i",
        "s = ReduceSum<keepdims = 0>(i, last)  t = Sub(s, one)",
        [[1] * 4] * 2,
    ),
    "places": ("int64[2,1] i", "t = ReduceMax<axes = [1], keepdims = 0>(i)", [[3], [3]]),
    "lengths": ("int64[2] i", "t = Identity(i)", [3, 3]),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_follow_from_what_else_is_given(tmp_path, name):
    """Random numbers in their place would be refused."""
    sign, body, wanted = LENGTHS[name]
    model = grouped_with_a_cache(sign, body, "int32[1] total")
    program = load_onnx(written(model, tmp_path))
    feeds = random_feeds(program)
    np.testing.assert_array_equal(feeds["i"], wanted)
    np.testing.assert_array_equal(feeds["total"], [4])
    plan = planned(program, {("wq", 1, 3): [0, 1]})
    verify_onnx(program, plan, SlimOnnx(program, plan)).raise_if_failed()
