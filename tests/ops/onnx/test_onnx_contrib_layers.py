"""ONNX Runtime's own norms, activations, products and experts, against numbers in float64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

import graphprune as gp
from graphprune.errors import VerifyError
from graphprune.frontends.onnx.load import load_onnx
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import (
    agree,
    attribute,
    fused,
    initialisers,
    operators,
    planned,
    run,
    weights,
    written,
)

KEEP = [1, 2, 5]  # of 8
X = weights(2, 3, 5, seed=9)
IMAGE = weights(2, 3, 6, 6, seed=9)
A, C = weights(5, 8), weights(8, 4)
SCALE, SHIFT, BIAS = weights(8, seed=1), weights(8, seed=2), weights(8, seed=3)


def norm(x, centred=True, epsilon=1e-12):
    x = x.astype(np.float64)
    x = x - x.mean(axis=-1, keepdims=True) if centred else x
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x, approximate="none"):
    return F.gelu(torch.from_numpy(np.asarray(x, np.float64)), approximate=approximate).numpy()


# Norms.


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("epsilon", [None, 0.01])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_of_a_residual_sum(tmp_path, simplified, epsilon, bias):
    """Numbers are small, so that another epsilon than the operator's own would be noticed."""
    name = "SkipSimplifiedLayerNormalization" if simplified else "SkipLayerNormalization"
    inputs = ["h", "k", "scale", *([] if simplified else ["shift"]), *(["bias"] if bias else [])]
    arrays = {"shift": SHIFT} if not simplified else {}
    small, other = A / 1000, weights(5, 8, seed=4) / 1000
    model = fused(
        f"""g (float[2,3,5] x) => (float[2,3,4] y, float[2,3,4] z) {{
        h = MatMul(x, a)  k = MatMul(x, b)
        n, mean, inverse, s = ort.{name}{"" if epsilon is None else f"<epsilon = {epsilon}>"}
            ({", ".join(inputs)})
        y = MatMul(n, c)  z = MatMul(s, c) }}""",
        a=small,
        b=other,
        c=C,
        scale=SCALE,
        **arrays,
        **({"bias": BIAS / 1000} if bias else {}),
    )
    total = X @ (small + other)[:, KEEP] + (BIAS[KEEP] / 1000 if bias else 0)
    n = norm(total, not simplified, epsilon or 1e-12) * SCALE[KEEP]
    n = n if simplified else n + SHIFT[KEEP]
    agree(model, tmp_path, {("a", 1): KEEP}, [n @ C[KEEP], total @ C[KEEP]], x=X)


@pytest.mark.parametrize("skip", ["1,3,8", "3,8"])
def test_a_skip_that_is_shared_by_the_batch(tmp_path, skip):
    k = weights(*map(int, skip.split(",")))
    model = fused(
        """g (float[2,3,5] x) => (float[2,3,4] y) {
        h = MatMul(x, a)  n = ort.SkipLayerNormalization(h, k, scale, shift)  y = MatMul(n, c) }""",
        a=A,
        k=k,
        c=C,
        scale=SCALE,
        shift=SHIFT,
    )
    n = norm(X @ A[:, KEEP] + k[..., KEEP]) * SCALE[KEEP] + SHIFT[KEEP]
    agree(model, tmp_path, {("a", 1): KEEP}, [n @ C[KEEP]], x=X)


@pytest.mark.parametrize("epsilon", [None, 0.01])
def test_root_mean_square_in_the_domain_of_onnx(tmp_path, epsilon):
    """The checker of ONNX doesn't know the operator; files of optimisers have it all the same."""
    options = "axis = -1" if epsilon is None else f"axis = -1, epsilon = {epsilon}"
    model = fused(
        f"""g (float[2,3,5] x) => (float[2,3,4] y) {{
        h = MatMul(x, a)  n = SimplifiedLayerNormalization<{options}>(h, scale)
        y = MatMul(n, c) }}""",
        a=A / 1000,
        c=C,
        scale=SCALE,
    )
    n = norm(X @ A[:, KEEP] / 1000, False, epsilon or 1e-5) * SCALE[KEEP]
    agree(model, tmp_path, {("a", 1): KEEP}, [n @ C[KEEP]], x=X)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_norm_of_an_embedding(tmp_path, segments, positions):
    """All results are read: the norm, the number of tokens, and the sum."""
    words, places, kinds = (weights(n, 8, seed=n) / 1000 for n in (11, 9, 2))
    sign = "int32[2,3] i, int32[2,3] mask"
    sign += (", int32[2,3] t" if segments else "") + (", int32[1,3] p" if positions else "")
    model = fused(
        f"""g ({sign}) => (float[2,3,4] y, int32[2] m, float[2,3,4] z) {{
        n, k, s = ort.EmbedLayerNormalization<mask_index_type = 1>
            (i, {"t" if segments else '""'}, words, places, {"kinds" if segments else '""'},
            scale, shift, mask{", p" if positions else ""})
        m = Identity(k)  y = MatMul(n, c)  z = MatMul(s, c) }}""",
        words=words,
        places=places,
        c=C,
        scale=SCALE,
        shift=SHIFT,
        **({"kinds": kinds} if segments else {}),
    )
    i, t, p = np.array([[3, 10, 0], [7, 7, 2]]), np.array([[0, 1, 1], [0, 0, 1]]), [[4, 0, 8]]
    mask = np.array([[1, 1, 0], [1, 0, 0]], np.int32)
    total = words[i] + (places[p] if positions else places[:3]) + (kinds[t] if segments else 0)
    n = norm(total[..., KEEP]) * SCALE[KEEP] + SHIFT[KEEP]
    feeds = {"i": i, "mask": mask}
    feeds |= {"t": t} if segments else {}
    feeds |= {"p": np.array(p)} if positions else {}
    wanted = [n @ C[KEEP], mask.sum(axis=1), total[..., KEEP] @ C[KEEP]]
    feeds = {name: np.asarray(v, np.int32) for name, v in feeds.items()}
    agree(model, tmp_path, {("words", 1): KEEP}, wanted, **feeds)


@pytest.mark.parametrize("name", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_statistics_that_are_read_are_refused(tmp_path, name):
    model = fused(
        f"""g (float[2,3,5] x) => (float[2,3,4] y) {{
        h = MatMul(x, a)  n, mean, inverse = ort.{name}(h, h, scale)
        m = MatMul(n, c)  y = Add(m, inverse) }}""",
        a=A,
        c=C,
        scale=SCALE,
    )
    program = load_onnx(written(model, tmp_path))
    plan = planned(program, {("a", 1): KEEP})
    with pytest.raises(VerifyError, match=f"statistics of {name}|can't run the model"):
        verify_onnx(program, plan, SlimOnnx(program, plan))


# Products and activations.


@pytest.mark.parametrize("name", ["FusedMatMul", "TransposeMatMul"])
@pytest.mark.parametrize("a", [0, 1])
@pytest.mark.parametrize("b", [0, 1])
def test_product_of_transposed_operands(tmp_path, name, a, b):
    h = np.swapaxes(X, 1, 2) if a else X
    w, c = (A.T if b else A), weights(8, 4)
    model = fused(
        f"""g (float[2,{h.shape[1]},{h.shape[2]}] x) => (float[2,3,4] y) {{
        h = ort.{name}<transA = {a}, transB = {b}, alpha = 0.5>(x, w)
        r = Relu(h)  y = MatMul(r, c) }}""",
        w=np.ascontiguousarray(w),
        c=c,
    )
    wanted = np.maximum(0.5 * X @ A[:, KEEP], 0) @ c[KEEP]
    agree(model, tmp_path, {("w", 0 if b else 1): KEEP}, [wanted], x=np.ascontiguousarray(h))


@pytest.mark.parametrize("trans", [0, 1])
def test_product_with_the_batch_in_the_middle(tmp_path, trans):
    """``[rows, batch, in]`` and ``[out or in, batch, in or out]``, multiplied for every batch."""
    w = weights(5, 2, 8)  # in, batch, out
    model = fused(
        f"""g (float[3,2,5] x) => (float[2,3,4] y) {{
        h = ort.FusedMatMul<transBatchA = 1, transBatchB = 1, transB = {trans}>(x, w)
        r = Relu(h)  y = MatMul(r, c) }}""",
        w=np.ascontiguousarray(np.transpose(w, (2, 1, 0)) if trans else w),
        c=C,
    )
    x = np.transpose(X, (1, 0, 2))
    h = np.einsum("bri,ibo->bro", X, w[:, :, KEEP])
    plan = {("w", 0 if trans else 2): KEEP}
    agree(model, tmp_path, plan, [np.maximum(h, 0) @ C[KEEP]], x=np.ascontiguousarray(x))


def test_gemm_with_an_activation(tmp_path):
    model = fused(
        """g (float[3,5] x) => (float[3,4] y) {
        h = ort.FusedGemm<transB = 1, alpha = 2.0, activation = "LeakyRelu",
            activation_alpha = 0.1>(x, w, bias)
        y = MatMul(h, c) }""",
        w=np.ascontiguousarray(A.T),
        bias=BIAS,
        c=C,
    )
    h = 2 * X[0] @ A[:, KEEP] + BIAS[KEEP]
    wanted = np.where(h > 0, h, 0.1 * h) @ C[KEEP]
    agree(model, tmp_path, {("w", 0): KEEP}, [wanted], x=X[0])
    assert {s.role for s in load_onnx(tmp_path / "dense.onnx").structures if s.prunable} == {"ffn"}


def conv(x, w, **options):
    return F.conv2d(torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(w)), **options)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_with_a_residual_and_an_activation(tmp_path, groups):
    a, w, c = weights(8, 3, 1, 1), weights(8, 8 // groups, 3, 3), weights(2, 8, 1, 1)
    model = fused(
        f"""g (float[2,3,6,6] x) => (float[2,2,6,6] y) {{
        h = Conv(x, a)
        r = ort.FusedConv<group = {groups}, pads = [1,1,1,1], activation = "Relu">(h, w, bias, h)
        y = Conv(r, c) }}""",
        a=a,
        w=w,
        c=c,
        bias=BIAS,
    )
    kept = KEEP if groups == 1 else [2, 3, 6, 7]
    left = w[kept][:, kept] if groups == 1 else w[kept]
    h = conv(IMAGE, a[kept])
    bias = torch.from_numpy(BIAS[kept])
    r = torch.relu(F.conv2d(h, torch.from_numpy(left), bias, padding=1, groups=min(groups, 2)) + h)
    plan = {("a", 0): KEEP} if groups == 1 else {("w", 0, 4): [1, 3]}
    slim = agree(model, tmp_path, plan, [conv(r.numpy(), c[:, kept]).numpy()], x=IMAGE)
    assert attribute(operators(slim, "FusedConv")[0], "group") == min(groups, 2)


@pytest.mark.parametrize(
    "options",
    [
        "strides = [2,3]",
        "pads = [1,0,2,1], dilations = [2,1]",
        'auto_pad = "SAME_UPPER", strides = [2,2]',
        'auto_pad = "VALID"',
    ],
)
def test_sizes_of_a_fused_convolution(tmp_path, options):
    model = fused(
        f"g (float[2,3,7,6] x) => (float[a,b,c,d] y) {{ y = ort.FusedConv<{options}>(x, w) }}",
        w=weights(4, 3, 3, 2),
    )
    file = written(model, tmp_path)
    (found,) = run(file, x=weights(2, 3, 7, 6))
    assert load_onnx(file).known["y"].shapes[0] == found.shape


ACTIVATIONS = {
    "ort.Gelu(h)": gelu,
    "ort.FastGelu(h)": lambda h: gelu(h, "tanh"),
    "ort.FastGelu(h, bias)": lambda h: gelu(h + BIAS[KEEP], "tanh"),
    "ort.BiasGelu(h, bias)": lambda h: gelu(h + BIAS[KEEP]),
    "ort.QuickGelu<alpha = 1.5>(h)": lambda h: h * sigmoid(1.5 * h),
}


@pytest.mark.parametrize("call", ACTIVATIONS)
def test_activations(tmp_path, call):
    model = fused(
        f"""g (float[2,3,5] x) => (float[2,3,4] y) {{
        h = MatMul(x, a)  r = {call}  y = MatMul(r, c) }}""",
        a=A,
        c=C,
        **({"bias": BIAS} if "bias" in call else {}),
    )
    wanted = ACTIVATIONS[call](X @ A[:, KEEP]) @ C[KEEP]
    agree(model, tmp_path, {("a", 1): KEEP}, [wanted], x=X)
    assert {s.role for s in load_onnx(tmp_path / "dense.onnx").structures if s.prunable} == {"ffn"}


# Experts.


def experts(x, router, first, second, biases, k, activation, normalise):
    """What the operator says of itself, for tokens ``[n, hidden]``."""
    shares = np.exp(router - router.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    out = np.zeros(x.shape)
    for i, token in enumerate(x):
        best = np.argsort(-shares[i])[:k]
        part = shares[i][best] / (shares[i][best].sum() if normalise else 1)
        for e, share in zip(best, part, strict=True):
            inner = activation(first[e] @ token + biases[0][e])
            out[i] += share * (second[e] @ inner + biases[1][e])
    return out


def swiglu(h):
    return h[::2] * sigmoid(h[::2]) * h[1::2]


@pytest.mark.parametrize(
    ("activation", "formula"),
    [("relu", lambda h: np.maximum(h, 0)), ("silu", lambda h: h * sigmoid(h)), ("swiglu", swiglu)],
)
@pytest.mark.parametrize("normalise", [0, 1])
def test_experts(tmp_path, activation, formula, normalise):
    """4 experts of 6 inner channels lose one expert, two channels and some of their input."""
    fusion = int(activation == "swiglu")
    first, second = weights(4, 6 << fusion, 8), weights(4, 8, 6)
    biases, router = (weights(4, 6 << fusion), weights(4, 8)), weights(8, 4)
    model = fused(
        f"""g (float[2,3,5] x) => (float[2,3,4] y) {{
        h = MatMul(x, a)  r = MatMul(h, router)  f = Reshape(r, flat)
        m = ort.MoE<k = 2, activation_type = "{activation}", swiglu_fusion = {fusion},
            normalize_routing_weights = {normalise}>(h, f, first, b1, second, b2)
        y = MatMul(m, c) }}""",
        a=A,
        c=C,
        router=router,
        first=first,
        second=second,
        b1=biases[0],
        b2=biases[1],
        flat=np.array([-1, 4]),
    )
    e, inner = [0, 2, 3], [0, 1, 3, 5]
    rows = [2 * i + j for i in inner for j in (0, 1)] if fusion else inner
    h = (X @ A[:, KEEP]).reshape(-1, 3).astype(np.float64)
    out = experts(
        h,
        h @ router[KEEP][:, e],
        first[e][:, rows][..., KEEP],
        second[e][:, KEEP][..., inner],
        (biases[0][e][:, rows], biases[1][e][:, KEEP]),
        2,
        formula,
        normalise,
    )
    plan = {("first", 0): e, ("second", 2): inner, ("a", 1): KEEP}
    agree(model, tmp_path, plan, [out.reshape(2, 3, 3) @ C[KEEP]], x=X)
    program = load_onnx(tmp_path / "dense.onnx")
    roles = {s.role: s for s in program.structures if s.prunable}
    assert {"experts", "ffn"} <= set(roles)
    assert roles["experts"].minimum == 2


def test_initialisers_shrink(tmp_path):
    """The fused form of an encoder's layer, compiled by fractions."""
    model = fused(
        """g (int32[2,5] i, int32[2,5] mask) => (float[2,5,16] y) {
        n, k = ort.EmbedLayerNormalization<mask_index_type = 1>
            (i, "", words, places, "", s, t, mask)
        a = ort.Attention<num_heads = 4>(n, w, b, k)  o = MatMul(a, wo)
        m = ort.SkipLayerNormalization(o, n, s1, t1, bo)
        f = MatMul(m, w1)  g = ort.BiasGelu(f, b1)  d = MatMul(g, w2)
        p = ort.SkipLayerNormalization(d, m, s2, t2, b2)  y = MatMul(p, head) }""",
        words=weights(11, 16),
        places=weights(9, 16),
        w=weights(16, 48),
        b=weights(48),
        wo=weights(16, 16),
        bo=weights(16),
        w1=weights(16, 24),
        b1=weights(24),
        w2=weights(24, 16),
        b2=weights(16),
        head=weights(16, 16, seed=1),
        **{n: weights(16, seed=i) for i, n in enumerate(("s", "t", "s1", "t1", "s2", "t2"))},
    )
    program = gp.load(written(model, tmp_path))
    assert {s.role for s in program.structures if s.prunable} == {
        "kv_heads", "qk_dim", "v_dim", "ffn", "hidden",
    }  # fmt: skip
    plan = gp.select(program, remove={"heads": 0.5, "ffn": 0.5, "hidden": 0.25})
    slim = gp.apply(program, plan)
    slim.save(tmp_path / "slim.onnx")
    gp.verify(program, plan, tmp_path / "slim.onnx").raise_if_failed()
    found = initialisers(onnx.load(tmp_path / "slim.onnx"))
    assert found["words"].shape == (11, 12)
    assert found["w"].shape == (12, 24)
    assert found["w1"].shape == (12, 12)
