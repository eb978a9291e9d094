"""Random groups of instructions that models are made of: attention, gates, residual stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from properties.drawing import Drawing


def inputs(d: Drawing, batch: int) -> None:
    """One or two inputs, and something that takes the first away from its frozen axes."""
    kind = d.number(6 if d.biases else 4)
    match kind:
        case 0:
            x = d.input("ids", 10, batch, d.choice([3, 4]))
        case 1 | 2:
            x = d.input(batch, d.choice([3, 4, 6]), d.choice([4, 6, 8]))
        case 3:
            x = d.input(batch, d.choice([4, 6]))
        case _:
            x = d.input(batch, 3, 4, 4)
    second = d.input(batch, 4, 6) if d.number(4) == 0 else None
    if kind and d.scale != 1 and d.number(2):  # a model for inputs of this scale
        x = d.add("shrunk", (x,), 1 / d.scale)
    if kind == 0:
        d.add("embedding", (x,), 10, d.choice([8, 12, 16]))
    elif kind < 4:
        d.add("linear", (x,), d.choice([8, 12, 16, 24]), d.biases)
    else:
        d.add("conv", (x,), d.choice([4, 6, 8, 12]), d.choice([1, 3]), 1, 1)
    if second is not None:
        d.add("linear", (second,), d.choice([8, 12]), d.biases)


def head(d: Drawing, v: int) -> int:
    """Something that frees a value of its own axes before it is returned."""
    shape, fixed = d.shape(v), d.fixed(v)
    rank = len(shape)
    choices = ["linear"] if rank and rank - 1 in fixed else []
    choices += ["mean"] if rank > 1 else []
    choices += ["flat"] if rank > 2 and 0 not in fixed and fixed == list(range(1, rank)) else []
    match d.choice(choices or ["none"]):
        case "linear":
            return d.add("linear", (v,), d.choice([2, 3]), d.biases)
        case "mean":
            dims = [i for i in range(rank) if i and d.number(2)] or [rank - 1]
            name = d.choice(["mean", "sum", "amax"])
            return d.add("reduce", (v,), name, tuple(dims), False)
        case "flat":
            return d.add("linear", (d.add("flatten", (v,), 1, rank - 1),), 2, d.biases)
    return v


def attention(d: Drawing) -> None:
    """Multi-head attention, grouped or not, projections fused or not, from another value or not."""
    x = d.pick(3)
    source = d.choice([v for v in d.tensors(3) if d.shape(v)[0] == d.shape(x)[0]])
    source = source if d.number(3) == 0 else x
    kv, times, dim = d.choice([1, 2, 3]), d.choice([1, 1, 2, 3]), d.choice([2, 4])
    heads = kv * times
    bias = d.number(2) == 0
    if source == x and times == 1 and d.number(2):
        q, k, v = _fused(d, x, heads, dim)
    else:
        v_dim = d.choice([dim, dim, 3])
        q = _heads(d, d.add("linear", (x,), heads * dim, bias), heads, dim)
        k = _heads(d, d.add("linear", (source,), kv * dim, bias), kv, dim)
        v = _heads(d, d.add("linear", (source,), kv * v_dim, bias), kv, v_dim)
    if d.number(3) == 0 and dim == 4:
        q, k = _rotary(d, q), _rotary(d, k)
    grouped = times > 1
    if grouped and d.number(2):
        if d.number(2):
            k, v = (d.add("repeat_interleave", (u,), times, 1) for u in (k, v))
        else:
            k, v = (_repeat(d, u, times) for u in (k, v))
        grouped = False
    if d.number(5) == 0 and not grouped:
        y = d.add("biased_sdpa", (q, k, v))
    elif d.number(2) or grouped:
        y = d.add("sdpa", (q, k, v), d.number(3) == 0, grouped)
    else:
        scores = d.add("matmul", (q, d.add("transpose", (k,), 2, 3)))
        y = d.add("matmul", (d.add("along", (scores,), "softmax", -1), v))
    y = d.add("flatten", (d.add("transpose", (y,), 1, 2),), 2, 3)
    y = d.add("linear", (y,), d.shape(x)[-1], bias)
    if d.number(2):
        d.add("binary", (x, y), "add")


def _heads(d: Drawing, v: int, heads: int, dim: int) -> int:
    return d.add("transpose", (d.add("unflatten", (v,), 2, heads, dim),), 1, 2)


def _fused(d: Drawing, x: int, heads: int, dim: int) -> list[int]:
    """Queries, keys and values from one projection, in one of the orders that people use."""
    v = d.add("linear", (x,), 3 * heads * dim, True)
    match d.number(4):
        case 0:
            parts = d.add("chunk", (v,), 3, 2)
            return [_heads(d, d.add("get", (parts,), i), heads, dim) for i in range(3)]
        case 1:  # three, heads, dim
            v = d.add("permute", (d.add("unflatten", (v,), 2, 3, heads, dim),), 2, 0, 3, 1, 4)
            parts = d.add("unbind", (v,), 0)
            return [d.add("get", (parts,), i) for i in range(3)]
        case 2:  # heads, three, dim
            v = d.add("permute", (d.add("unflatten", (v,), 2, heads, 3, dim),), 3, 0, 2, 1, 4)
            return [d.add("select", (v,), 0, i) for i in range(3)]
    v = d.add("transpose", (d.add("unflatten", (v,), 2, heads, 3 * dim),), 1, 2)
    parts = d.add("split", (v,), dim, 3)  # heads, (q + k + v)
    return [d.add("get", (parts,), i) for i in range(3)]


def _rotary(d: Drawing, v: int) -> int:
    """Rotate pairs of head dimensions, halves or neighbours."""
    length, dim = d.shape(v)[2:]
    table = d.add("buffer", (), length, dim)
    left = d.add("slice", (v,), 3, 0, dim // 2)
    right = d.add("unary", (d.add("slice", (v,), 3, dim // 2, None),), "neg")
    turned = d.add("cat", (right, left), 3)
    a, b = (d.add("binary", (u, table), "mul") for u in (v, turned))
    return d.add("binary", (a, b), "add")


def _repeat(d: Drawing, v: int, times: int) -> int:
    v = d.add("unsqueeze", (v,), 2)
    return d.add("flatten", (d.add("expand", (v,), -1, -1, times, -1, -1),), 1, 2)


def feed_forward(d: Drawing) -> None:
    """Two linears with something between, or a gate, and perhaps a residual."""
    x = d.pick(2, 3)
    width = d.choice([4, 6, 8, 12])
    match d.number(3):
        case 0:
            y = d.add("unary", (d.add("linear", (x,), width, True),), "gelu")
        case 1:
            gate = d.add("unary", (d.add("linear", (x,), width, False),), "silu")
            y = d.add("binary", (gate, d.add("linear", (x,), width, False)), "mul")
        case _:
            y = d.add("glu", (d.add("linear", (x,), 2 * width, True),), -1)
    y = d.add("linear", (y,), d.shape(x)[-1], True)
    if d.number(3):
        d.add("binary", (x, y), "add")


def excite(d: Drawing) -> None:
    """Squeeze and excitation of channels."""
    x = d.pick(4)
    y = d.add("reduce", (x,), "mean", (2, 3), True)
    y = d.add("unary", (d.add("conv", (y,), d.choice([2, 3, 4]), 1, 1, 1),), "relu")
    y = d.add("unary", (d.add("conv", (y,), d.shape(x)[1], 1, 1, 1),), "sigmoid")
    d.add("binary", (x, y), "mul")


def channel_shuffle(d: Drawing) -> None:
    x = d.pick(3, 4)
    channels = d.shape(x)[1]
    groups = d.choice([k for k in (2, 3, 4) if channels % k == 0 and k < channels])
    y = d.add("transpose", (d.add("unflatten", (x,), 1, groups, channels // groups),), 1, 2)
    d.add("flatten", (y,), 1, 2)


def queries(d: Drawing) -> None:
    """Cross-attention of learnt queries, or of a value to learnt keys."""
    x = d.pick(3)
    width = d.shape(x)[-1]
    n = d.choice([2, 4, 6])
    learnt = d.add("unsqueeze", (d.add("param", (), n, width),), 0)
    learnt = d.add("expand", (learnt,), ("B", 1), -1, -1)
    pair = [learnt, x] if d.number(2) else [x, learnt]
    d.add("sdpa", (pair[0], pair[1], pair[1]))


def conv_block(d: Drawing) -> None:
    """Convolution, norm, activation, and perhaps a residual."""
    x = d.pick(3, 4)
    channels = d.shape(x)[1]
    width = d.choice([4, 6, 8])
    y = d.add("conv", (x,), width, d.choice([1, 3]), 1, 1)
    norm: tuple[Any, ...] = d.choice([("batch_norm",), ("group_norm", 2), ("group_norm", 1)])
    y = d.add(norm[0], (y,), *norm[1:])
    y = d.add("unary", (y,), "relu")
    if d.number(2):
        y = d.add("conv", (y,), width, 3, width, 1)
    y = d.add("conv", (y,), channels, 1, 1, 1)
    if d.number(3):
        d.add("binary", (x, y), "add")


def stack(d: Drawing) -> None:
    """A module list of two or three residual blocks, not all of one kind."""
    x = d.pick(2, 3, 4)
    shape = d.shape(x)
    blocks = []
    for _ in range(d.choice([2, 2, 3])):
        width = d.choice([3, 4, 6])
        match d.number(4) if len(shape) < 4 else 4:
            case 0:
                steps: list[tuple[Any, ...]] = [("linear", (0,), width), ("unary", (1,), "gelu"),
                         ("linear", (2,), shape[-1]), ("binary", (0, 3), "add")]  # fmt: skip
            case 1:
                steps = [("layer_norm", (0,)), ("linear", (1,), width), ("unary", (2,), "silu"),
                         ("linear", (1,), width), ("binary", (3, 4), "mul"),
                         ("linear", (5,), shape[-1], False), ("binary", (6, 0), "add")]  # fmt: skip
            case 2:
                steps = [("linear", (0,), shape[-1]), ("rms_norm", (1,)), ("unary", (2,), "tanh"),
                         ("binary", (3, 0), "add")]  # fmt: skip
            case 3:
                steps = [("linear", (0,), width), ("linear", (1,), shape[-1]),
                         ("binary", (0, 2), "add"), ("layer_norm", (3,))]  # fmt: skip
            case _:
                steps = [("conv", (0,), width, 3), ("batch_norm", (1,)), ("unary", (2,), "relu"),
                         ("conv", (3,), shape[1], 1), ("binary", (0, 4), "add")]  # fmt: skip
        blocks.append(tuple(steps))
    d.add("layers", (x,), *blocks)


def experts(d: Drawing) -> None:
    """A mixture of experts: gates over all of them, or the weights of the best."""
    x = d.pick(2, 3)
    if len(d.shape(x)) == 3:
        x = d.add("flatten", (x,), 0, 1)
    n = d.choice([3, 4, 6])
    scores = d.add("linear", (x,), n, False)
    if d.number(2):
        y = d.add("bank", (x, scores), d.choice([1, 2]), d.choice([4, 6, 8]))
        d.add("linear", (y,), d.shape(x)[-1], True)
        return
    gates = d.add("gates", (d.add("along", (scores,), "softmax", -1),), d.choice([1, 2]))
    width = d.choice([4, 6])
    w = d.add("param", (), n, d.shape(x)[-1], width)
    y = d.add("unary", (d.add("einsum", (x, w), "ti,eio->teo"),), "gelu")
    y = d.add("einsum", (y, d.add("param", (), n, width, d.shape(x)[-1])), "teo,eoi->tei")
    d.add("einsum", (y, gates), "tei,te->ti")


def memory(d: Drawing) -> None:
    x = d.pick(3)
    kind = d.choice(["lstm", "gru", "rnn"])
    d.add("recurrent", (x,), kind, d.choice([3, 4, 6]), d.choice([1, 1, 2]), d.number(3) == 0)


WEIGHTED = (
    (attention, 5), (feed_forward, 3), (excite, 2), (channel_shuffle, 2), (queries, 1),
    (conv_block, 3), (stack, 3), (experts, 2), (memory, 2),
)  # fmt: skip
