"""What ONNX Runtime for the CPU doesn't run: functions say what it does, or it is frozen."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, parser

from graphprune.frontends.onnx.load import load_onnx
from graphprune.oracle.masked_onnx import mask_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import attribute, fused, operators, planned, run, weights, written

KEEP = [1, 2, 5]  # of 8
X = weights(2, 3, 5, seed=9)
A, C = weights(5, 8), weights(8, 4)
SCALE, SHIFT, BIAS = weights(8, seed=1), weights(8, seed=2), weights(8, seed=3)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, epsilon):
    x = x.astype(np.float64)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)


def with_functions(model, *texts):
    """A model whose operators of ONNX Runtime are functions of the same names."""
    functions = [parser.parse_function(t) for t in texts]
    names = {f.name for f in functions}
    for node in model.graph.node:
        if node.op_type in names and node.domain == "com.microsoft":
            node.domain = "local"
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def function(signature, body):
    return f'<domain: "local", opset_import: ["" : 21]> {signature} {{ {body} }}'


def judge(model, tmp_path, kept, expected, texts, **feeds):
    """As `agree`, with functions in place of operators that can't be run."""
    file = written(model, tmp_path)
    program = load_onnx(file)
    plan = planned(program, kept)
    masked = program.model.clone()
    mask_onnx(masked, program.known, program.typing, plan.bind(program).keep)
    slim = SlimOnnx(program, plan).rewritten()
    for name, one in (("masked", masked), ("slim", slim)):
        proto = with_functions(ir.to_proto(one), *texts)
        onnx.save(proto, tmp_path / f"{name}.onnx")
        for found, wanted in zip(run(tmp_path / f"{name}.onnx", **feeds), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    return ir.to_proto(slim)


def test_bias_and_residual(tmp_path):
    model = fused(
        """g (float[2,3,5] x) => (float[2,3,4] y) {
        h = MatMul(x, a)  k = MatMul(x, b)  s = ort.BiasAdd(h, bias, k)  y = MatMul(s, c) }""",
        a=A,
        b=weights(5, 8, seed=4),
        c=C,
        bias=BIAS,
    )
    wanted = (X @ (A + weights(5, 8, seed=4))[:, KEEP] + BIAS[KEEP]) @ C[KEEP]
    text = function("BiasAdd (x, b, k) => (y)", "s = Add(x, b)  y = Add(s, k)")
    judge(model, tmp_path, {("a", 1): KEEP}, [wanted], [text], x=X)


def test_gate(tmp_path):
    w = weights(5, 16)
    model = fused(
        """g (float[2,3,5] x) => (float[2,3,4] y) {
        h = MatMul(x, w)  s = ort.BiasSplitGelu(h, bias)  y = MatMul(s, c) }""",
        opset=21,
        w=w,
        c=C,
        bias=weights(16),
    )
    h = X @ w + weights(16)
    wanted = (h[..., :8] * F.gelu(torch.from_numpy(h[..., 8:])).numpy())[..., KEEP] @ C[KEEP]
    body = "s = Add(x, b)  l, r = Split<axis = -1, num_outputs = 2>(s)  g = Gelu(r)  y = Mul(l, g)"
    text = function("BiasSplitGelu (x, b) => (y)", body)
    judge(model, tmp_path, {("c", 0): KEEP}, [wanted], [text], x=X)
    assert {s.role for s in load_onnx(tmp_path / "dense.onnx").structures if s.prunable} == {"ffn"}


GROUP_NORM = """n = GroupNormalization<num_groups : int = @groups, epsilon : float = @epsilon>
    (u, g, b)  v = Sigmoid(n)  w = Mul(n, v)"""


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("what", ["groups", "channels"])
@pytest.mark.parametrize("skip", ["", "image", "row"])
def test_group_norm(tmp_path, last, what, skip):
    """4 groups of 2 channels, an activation, and a residual of an image or of each channel."""
    a, b, c = weights(3, 8), weights(3, 8, seed=1), weights(8, 2)
    inward, outward = "Transpose<perm = [0,3,1,2]>", "Transpose<perm = [0,2,3,1]>"
    before, after = ("Identity", "Identity") if last else (inward, outward)
    residual = {
        "": "",
        "image": f"e = MatMul(x, b)  k = {before}(e)",
        "row": "m = ReduceMean<keepdims = 0>(x, places)  k = MatMul(m, b)",
    }[skip]
    name, inputs = "GroupNorm", "h, scale, shift"
    if skip:
        name, inputs = f"Skip{name}", f"{inputs}, k, bias"
    model = fused(
        f"""g (float[2,4,4,3] x) => (float[2,4,4,2] y) {{
        d = MatMul(x, a)  h = {before}(d)  {residual}
        n {", s" if skip else ""} = ort.{name}
            <channels_last = {last}, groups = 4, activation = 1, epsilon = 0.001>({inputs})
        t = {after}(n)  y = MatMul(t, c) }}""",
        opset=21,
        a=a,
        c=c,
        scale=SCALE,
        shift=SHIFT,
        **({"b": b, "bias": BIAS} if skip else {}),
        **({"places": np.array([1, 2])} if skip == "row" else {}),
    )
    groups, size, units = (2, 4, [0, 2]) if what == "groups" else (4, 2, [1])
    kept = [0, 1, 4, 5] if what == "groups" else [1, 3, 5, 7]
    x = weights(2, 4, 4, 3)
    rest = x if skip == "image" else x.mean(axis=(1, 2), keepdims=True)
    total = x @ a[:, kept] + (BIAS[kept] + rest @ b[:, kept] if skip else 0)
    flat = total.reshape(2, 16, groups, -1).swapaxes(1, 2).reshape(2, groups, -1)
    n = norm(flat, epsilon=1e-3).reshape(2, groups, 16, -1).swapaxes(1, 2).reshape(total.shape)
    n = n * SCALE[kept] + SHIFT[kept]

    sums = "t = Identity(x)"
    if skip:
        wide = "[0,1,1,-1]" if last else "[0,-1,1,1]"
        shape = "o = Shape(x)" if skip == "image" else f"o = Constant<value_ints = {wide}>()"
        column = "[-1]" if last else "[-1,1,1]"
        sums = f"""{shape}  j = Reshape(k, o)  p = Constant<value_ints = {column}>()
            q = Reshape(i, p)  z = Add(x, j)  t = Add(z, q)"""
    ends = (inward, outward) if last else ("Identity", "Identity")
    text = function(
        f"{name} <groups, epsilon> ({'x, g, b, k, i' if skip else 'x, g, b'}) => "
        f"({'y, t' if skip else 'y'})",
        f"{sums}  u = {ends[0]}(t)  {GROUP_NORM}  y = {ends[1]}(w)",
    )
    wanted = (n * sigmoid(n)) @ c[kept]
    slim = judge(model, tmp_path, {("c", 0, size): units}, [wanted], [text], x=x)
    assert attribute(operators(slim, name)[0], "groups") == groups


@pytest.mark.parametrize("both", [False, True])
def test_packed_queries_keys_and_values(tmp_path, both):
    """``[batch, length, heads, 3, dim]``, or keys and values of 2; kernels are for GPUs only."""
    wq, w, o = weights(5, 24), weights(5, 48 if both else 72), weights(24, 3)
    n = 2 if both else 3
    model = fused(
        f"""g (float[2,3,5] x) => (float[2,3,3] y) {{
        m = MatMul(x, w)  p = Reshape(m, shape)  {"q = MatMul(x, wq)" if both else ""}
        a = ort.MultiHeadAttention<num_heads = 4>({"q, p" if both else "p"})
        y = MatMul(a, o) }}""",
        opset=21,
        w=w,
        o=o,
        shape=np.array([0, 0, 4, n, 6]),
        **({"wq": wq} if both else {}),
    )
    heads, dims = [0, 2, 3], [0, 1, 2, 4]
    packed = (X @ w).reshape(2, 3, 4, n, 6)[:, :, heads][..., dims].astype(np.float64)
    q = (X @ wq).reshape(2, 3, 4, 6)[:, :, heads][..., dims] if both else packed[..., 0, :]
    q, k, v = (t.swapaxes(1, 2) for t in (q, packed[..., -2, :], packed[..., -1, :]))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(6)
    shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    out = (shares @ v).swapaxes(1, 2).reshape(2, 3, -1)
    wanted = out @ o[[6 * h + d for h in heads for d in dims]]
    plan = {("o", 0, 4): heads, ("o", 0, 6): dims}
    file = written(model, tmp_path)
    program = load_onnx(file)
    slim = SlimOnnx(program, planned(program, plan)).rewritten()
    proto = ir.to_proto(slim)
    (node,) = operators(proto, "MultiHeadAttention")
    assert attribute(node, "num_heads") == 3
    assert attribute(node, "scale") == pytest.approx(1 / math.sqrt(6))
    # In place of the operator: the same operator on what it unpacks.
    split = "k, v = Split<axis = 3, num_outputs = 2>" if both else (
        "q, k, v = Split<axis = 3, num_outputs = 3>"
    )  # fmt: skip
    flat = "".join(f"f{t} = Reshape({t}, s)  " for t in ("k", "v") if both)
    flat = flat or "".join(f"f{t} = Reshape({t}, s)  " for t in "qkv")
    text = f"""<domain: "local", opset_import: ["" : 21, "com.microsoft" : 1]>
        MultiHeadAttention <num_heads, scale> ({"fq, p" if both else "p"}) => (y) {{
        s = Constant<value_ints = [0,0,-1]>()  {split}(p)  {flat}
        y = com.microsoft.MultiHeadAttention<num_heads : int = @num_heads,
            scale : float = @scale>(fq, fk, fv) }}"""
    onnx.save(with_functions(proto, text), tmp_path / "slim.onnx")
    (found,) = run(tmp_path / "slim.onnx", x=X)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


FROZEN = {
    "PackedAttention": (
        "ort.PackedAttention<num_heads = 2>(h, w, b, tokens, lengths)",
        "float[6,8] y",
        {"w": weights(8, 24), "b": weights(24), "tokens": np.zeros((2, 3), np.int32),
         "lengths": np.zeros(3, np.int32)},
        "packed tokens",
    ),
    "PackedMultiHeadAttention": (
        'ort.PackedMultiHeadAttention<num_heads = 2>(h, h, h, "", tokens, lengths)',
        "float[6,8] y",
        {"tokens": np.zeros((2, 3), np.int32), "lengths": np.zeros(3, np.int32)},
        "packed tokens",
    ),
    "NhwcConv": (
        "ort.NhwcConv<kernel_shape = [3,3]>(h, w)",
        "float[1,4,4,4] y",
        {"w": weights(4, 3, 3, 8)},
        "layout of the weight",
    ),
    "DecoderMaskedMultiHeadAttention": (
        "ort.DecoderMaskedMultiHeadAttention<num_heads = 2>(h, h, h)",
        "float[2,1,8] y",
        {},
        "one token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_with_a_reason(tmp_path, name):
    call, result, arrays, why = FROZEN[name]
    shape = {"NhwcConv": "1,6,6,5", "DecoderMaskedMultiHeadAttention": "2,1,5"}.get(name, "6,5")
    model = fused(
        f"""g (float[{shape}] x) => (float[{result.split("[")[1].split("]")[0]}] y) {{
        h = MatMul(x, a)  u = {call}  v = Relu(u)  y = Identity(v) }}""",
        a=A,
        **arrays,
    )
    program = load_onnx(written(model, tmp_path))
    (reason,) = {s.reason for s in program.structures if ("a", 1) in s.members}
    assert why in reason
    wanted = tuple(int(n) for n in result.split("[")[1].split("]")[0].split(","))
    assert program.known["v"].shapes[0] == wanted


ATTENTION = {
    "ort.Attention<num_heads = 2, past_present_share_buffer = 1>(h, w)": "written in place",
    "ort.Attention<num_heads = 3>(h, w)": "for 3 heads",
    "ort.Attention<num_heads = 2, qkv_hidden_sizes = [8,4,12]>(h, w)": "queries, keys and values",
    'ort.MultiHeadAttention<num_heads = 2>(h, h, h, "", "", "", "", "", one)': "written in place",
    "ort.MultiHeadAttention<num_heads = 3>(h, h, h)": "8 channels for 3 heads",
    "ort.GroupQueryAttention<num_heads = 2, kv_num_heads = 2, sliding_window_cache = 1>"
    '(h, h, h, "", "", one, one)': "written in place",
    "ort.GroupQueryAttention<num_heads = 2, kv_num_heads = 2>"
    '(h, h, h, "", "", one, one, "", "", "", "", "", one, one)': "a quantised key-value cache",
    "ort.RotaryEmbedding<is_packed_batching = 1>(h, one, w, w)": "packed into one",
}


@pytest.mark.parametrize("call", ATTENTION)
def test_uses_that_are_frozen(tmp_path, call):
    model = fused(
        f"""g (float[2,3,5] x) => (float[2,3,n] y) {{
        h = MatMul(x, a)  u = {call}  y = Relu(u) }}""",
        a=A,
        w=weights(8, 24),
        one=np.array([1], np.int32),
    )
    program = load_onnx(written(model, tmp_path))
    (reason,) = {s.reason for s in program.structures if ("a", 1) in s.members}
    assert ATTENTION[call] in reason


def test_dims_that_are_rotated_inside(tmp_path):
    """Only they stay."""
    model = fused(
        """g (float[2,3,5] x) => (float[2,3,3] y) {
        u = ort.Attention<num_heads = 2, do_rotary = 1, qkv_hidden_sizes = [8,8,6]>(x, w)
        y = MatMul(u, o) }""",
        w=weights(5, 22),
        o=weights(6, 3),
    )
    program = load_onnx(written(model, tmp_path))
    found = {s.size: s for s in program.structures if ("w", 1) in s.members}
    assert "rotated inside" in found[4].reason
    assert found[2].prunable
    assert found[3].prunable
