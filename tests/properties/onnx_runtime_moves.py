"""Random operators of ONNX Runtime's own domain, which its optimisers leave in files."""

from __future__ import annotations

import numpy as np

from properties.onnx_drawing import Drawing, Misfit


def activation(d: Drawing) -> None:
    x = d.pick(2, 3)
    kind = d.choice(["Gelu", "FastGelu", "QuickGelu", "BiasGelu"])
    bias = [d.weight(d.shape(x)[-1])] if kind == "BiasGelu" else []
    d.add(kind, [x, *bias], domain="com.microsoft", result=lambda x, *_: np.tanh(x))


def skip_norm(d: Drawing) -> None:
    """The sum of two values, normalised; perhaps the sum as well, which is the fourth result."""
    x = d.pick(3)
    n = d.shape(x)[-1]
    skip = d.choice([v for v in d.floats(3) if d.shape(v) == d.shape(x)])
    kind = d.choice(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
    shift = [d.weight(n)] if kind == "SkipLayerNormalization" and d.number(2) else []
    d.add(kind, [x, skip, d.weight(n), *shift], domain="com.microsoft",
          result=lambda x, y, *_: np.tanh(x + y))  # fmt: skip


def simplified_norm(d: Drawing) -> None:
    x = d.pick(2, 3)
    weight = d.weight(d.shape(x)[-1])
    d.add("SimplifiedLayerNormalization", [x, weight], domain="ort",
          result=lambda x, *_: np.tanh(x), axis=-1, stash_type=1)  # fmt: skip


def fused_product(d: Drawing) -> None:
    """A product with a weight, which is turned or not."""
    x = d.pick(2, 3)
    if len(d.shape(x)) - 1 not in d.fixed(x):
        raise Misfit("its last dimension is the batch")
    n, out, turned = d.shape(x)[-1], d.choice([3, 4, 6]), d.number(2)
    w = d.weight(*((out, n) if turned else (n, out)), fan_in=n)
    d.add("FusedMatMul", [x, w], domain="com.microsoft",
          result=lambda x, w: x @ (w.T if turned else w), transB=turned, alpha=0.5)  # fmt: skip


def multi_head(d: Drawing) -> None:
    """Attention with its projections in it, or apart."""
    x = d.pick(3)
    if d.fixed(x)[-1:] != [2]:
        raise Misfit("its last dimension is the batch")
    n, heads, dim = d.shape(x)[-1], d.choice([1, 2, 3]), d.choice([2, 4])
    total = heads * dim
    if d.number(2):
        operands = [x, d.weight(n, 3 * total, fan_in=n), d.weight(3 * total)]
        kind = "Attention"
    else:
        kind = "MultiHeadAttention"
        operands = [d.add("MatMul", [x, d.weight(n, total, fan_in=n)])[0] for _ in range(3)]
    (y,) = d.add(kind, operands, domain="com.microsoft", num_heads=heads,
                 result=lambda x, *_: np.tanh(x[..., :1]).repeat(total, -1))  # fmt: skip
    (y,) = d.add("MatMul", [y, d.weight(total, n, fan_in=total)])
    d.add("Add", [x, y])


def draw(d: Drawing) -> None:
    """One of them, in float32, for which ONNX Runtime has them all."""
    if d.type != np.float32:
        raise Misfit("in float32 only")
    d.choice([activation, skip_norm, simplified_norm, fused_product, multi_head])(d)
