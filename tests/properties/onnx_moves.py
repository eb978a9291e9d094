"""Random ONNX operators, by family. A move that doesn't fit raises; the caller goes on."""

from __future__ import annotations

from typing import Any

import numpy as np

from properties import onnx_runtime_moves
from properties.onnx_drawing import BATCHES, Drawing

WIDTHS = [2, 3, 4, 6, 8, 12]

# Zero where what they read is zero.
_PLAIN_UNARY = (
    "Relu Tanh Neg Abs Identity LeakyRelu Elu Selu HardSwish Mish Softsign Erf Sin Atan Asinh "
    "Sinh Gelu Celu Shrink Sign Ceil Floor"
).split()
_UNARY = [*_PLAIN_UNARY, *"Sigmoid Softplus Exp Cos Reciprocal HardSigmoid Swish Cosh".split()]
_REDUCE = "Mean Sum SumSquare Max Min Prod L1 L2 LogSumExp".split()


def begin(d: Drawing, dynamic: bool) -> None:
    """One input or two, and an operator with weights that leads away from each."""
    batches = BATCHES if dynamic else (BATCHES[0],) * 2
    for i in range(1 + d.chance(3)):
        kind = d.number(5)
        if kind == 0:
            ids = d.input(
                f"ids{i}",
                tuple(d.numbers.integers(0, 9, (n, 4)) for n in batches),  # type: ignore[arg-type]
            )
            d.add("Gather", [d.weight(9, d.choice(WIDTHS)), ids])
            continue
        shape: tuple[int, ...] = ((6,), (4, 6), (4, 6), (3, 4, 4))[kind - 1]
        x = d.input(f"x{i}", tuple(d.random(n, *shape) for n in batches))  # type: ignore[arg-type]
        if len(shape) == 3 and d.type == np.float32:
            d.add("Conv", [x, d.weight(8, 3, 3, 3, fan_in=27)], pads=[1, 1, 1, 1])
        else:
            d.add("MatMul", [x, d.weight(shape[-1], d.choice(WIDTHS), fan_in=shape[-1])])


def draw(d: Drawing) -> None:
    """One random move."""
    move = d.rng.choice(_PLAIN if d.plain else _ALL)
    if not d.plain or move not in (_SHIFTS if not d.biases else _SUMS):
        move(d)


def linear(d: Drawing) -> None:
    x = d.pick(2, 3, 4)
    n, out = d.shape(x)[-1], d.choice(WIDTHS)
    if len(d.shape(x)) == 2 and d.chance(2):
        turned = d.number(2)
        w = d.weight(*((out, n) if turned else (n, out)), fan_in=n)
        bias = [d.weight(*d.choice([(out,), (1, out)]))] if d.biases and d.number(3) else []
        d.add("Gemm", [x, w, *bias], transB=turned or None, alpha=d.choice([None, 0.5]))
        return
    (y,) = d.add("MatMul", [x, d.weight(n, out, fan_in=n)])
    if d.biases and d.number(3):
        pair = [y, d.weight(out)]
        d.add("Add", pair if d.number(2) else pair[::-1])


def conv(d: Drawing) -> None:
    x = d.pick(3, 4)
    channels, space = d.shape(x)[1], len(d.shape(x)) - 2
    groups = d.choice([1, 1, channels, *(k for k in (2, 3) if channels % k == 0)])
    each, kernel = d.choice([1, 2, 3, 4]), d.choice([1, 3])
    bias = [d.weight(groups * each)] if d.biases and d.number(2) else []
    if d.number(4):
        w = d.weight(groups * each, channels // groups, *[kernel] * space, fan_in=kernel**space)
        pads = {"pads": [kernel // 2] * 2 * space} if d.number(2) else {"auto_pad": "SAME_UPPER"}
        strides = [d.choice([1, 1, 2])] * space
        d.add("Conv", [x, w, *bias], group=groups, strides=strides, **pads)
    else:
        w = d.weight(channels, each, *[2] * space, fan_in=channels)
        d.add("ConvTranspose", [x, w, *bias], group=groups, strides=[d.choice([1, 2])] * space)


def batch_norm(d: Drawing) -> None:
    if d.plain and d.opset < 14:
        return  # where ONNX's reference takes statistics of the batch
    x = d.pick(2, 3, 4)
    n = d.shape(x)[1]
    variance = d.constant(np.abs(d.random(n)) + d.type.type(0.5))
    d.add("BatchNormalization", [x, d.weight(n), d.weight(n), d.weight(n), variance])


def norm(d: Drawing) -> None:
    x = d.pick(2, 3, 4)
    shape = d.shape(x)
    match d.number(6):
        case 0 | 1:
            axis = d.choice([-1, -1, len(shape) - 1, 1])
            sizes = shape[axis:]
            shift = [d.weight(*sizes)] if d.number(2) else []
            d.add("LayerNormalization", [x, d.weight(*sizes), *shift], axis=axis)
        case 2:
            d.add("RMSNormalization", [x, d.weight(shape[-1])], axis=-1)
        case 3:
            d.add("InstanceNormalization", [x, d.weight(shape[1]), d.weight(shape[1])])
        case 4:
            groups = d.choice([k for k in (1, 2, 3, 4) if shape[1] % k == 0])
            each = shape[1] if d.opset >= 21 else groups
            d.add("GroupNormalization", [x, d.weight(each), d.weight(each)], num_groups=groups)
        case _:
            d.add("LpNormalization", [x], axis=d.number(len(shape)), p=d.choice([1, 2]))


def unary(d: Drawing) -> None:
    d.add(d.choice(_PLAIN_UNARY if d.plain else _UNARY), [d.pick()])


def clip(d: Drawing) -> None:
    low, high = (d.constant(np.array(v, d.type)) for v in (-0.5, 1.5))
    d.add("Clip", [d.pick(), low, high])


def binary(d: Drawing) -> None:
    """Two values of one shape, or a value and a weight that broadcasts to it."""
    x = d.pick()
    shape = d.shape(x)
    kinds = ["Mul"] if d.plain else ["Add", "Sub", "Mul", "Max", "Min"]
    if d.number(2):
        same = [v for v in d.floats() if d.shape(v) == shape and v != x]
        d.add(d.choice(["Add", "Add", "Sub", "Mul", "Max"]), [x, d.choice(same)])
        return
    sizes = [n if i in d.fixed(x) and d.number(3) else 1 for i, n in enumerate(shape)]
    pair = [x, d.weight(*sizes[d.number(len(sizes)) :])]
    d.add(d.choice(kinds), pair if d.number(2) else pair[::-1])


def gate(d: Drawing) -> None:
    x = d.pick()
    shape = d.shape(x)
    fits = [v for v in d.floats() if d.shape(v) == shape]
    (chosen,) = d.add(d.choice(["Greater", "Less"]), [x, d.choice(fits)])
    d.add("Where", [chosen, x, d.choice(fits)])


def product(d: Drawing) -> None:
    """A product of two values, one of them turned if need be."""
    a = d.pick(2, 3, 4)
    x = d.shape(a)
    (b,) = d.choice([[v] for v in d.floats(len(x)) if x[-1] in d.shape(v)[-2:]])
    if d.shape(b)[-2] != x[-1]:
        order = [*range(len(x) - 2), len(x) - 1, len(x) - 2]
        (b,) = d.add("Transpose", [b], perm=order)
    d.add("MatMul", [a, b])


def einsum(d: Drawing) -> None:
    x = d.pick(3)
    n, out = d.shape(x)[-1], d.choice(WIDTHS)
    d.add(
        "Einsum", [x, d.weight(out, n, fan_in=n)], equation=d.choice(["abc,dc->abd", "abc,dc->adb"])
    )


def transpose(d: Drawing) -> None:
    x = d.pick(2, 3, 4, 5)
    order = list(range(len(d.shape(x))))
    d.rng.shuffle(order)
    d.add("Transpose", [x], perm=order)


def divide(d: Drawing) -> None:
    """One dimension becomes two."""
    x = d.pick(2, 3, 4)
    shape, dim = d.shape(x), d.choice(d.fixed(x))
    front = d.choice([k for k in range(2, shape[dim]) if shape[dim] % k == 0])
    sizes = [n if i in d.fixed(x) else 0 for i, n in enumerate(shape)]
    sizes[dim : dim + 1] = [front, shape[dim] // front]
    if any(n == 0 for n in sizes[dim:]):
        sizes = [-1 if n == 0 else n for n in sizes]
    d.add("Reshape", [x, d.integers(*sizes)])


def merge(d: Drawing) -> None:
    """Two neighbouring dimensions become one."""
    x = d.pick(3, 4, 5)
    shape, fixed = d.shape(x), d.fixed(x)
    if d.chance(4):
        d.add("Flatten", [x], axis=d.number(len(shape)))
        return
    i = d.number(len(shape) - 1)
    varies = i not in fixed or i + 1 not in fixed
    sizes = [n if j in fixed else (0 if j < i else -1) for j, n in enumerate(shape)]
    sizes[i : i + 2] = [-1 if varies else shape[i] * shape[i + 1]]
    d.add("Reshape", [x, d.integers(*sizes)])


def squeeze(d: Drawing) -> None:
    """A dimension of one, and perhaps away again."""
    x = d.pick(1, 2, 3, 4)
    dim = d.number(len(d.shape(x)) + 1)

    def axes(kind: str, value: str) -> str:
        if d.opset >= 13:
            return d.add(kind, [value, d.integers(dim)])[0]
        return d.add(kind, [value], axes=[dim])[0]

    y = axes("Unsqueeze", x)
    if d.number(2):
        axes("Squeeze", d.add(d.choice(_PLAIN_UNARY), [y])[0])


def join(d: Drawing) -> None:
    x = d.pick()
    shape = d.shape(x)
    dim = d.number(len(shape))
    fits = [
        v
        for v in d.floats(len(shape))
        if all(i == dim or m == n for i, (m, n) in enumerate(zip(shape, d.shape(v), strict=True)))
    ]
    others = [d.choice(fits) for _ in range(d.choice([1, 1, 2]))]
    d.add("Concat", [x, *others], axis=dim - d.choice([0, len(shape)]))


def cut(d: Drawing) -> None:
    x = d.pick()
    dim = d.choice(d.fixed(x))
    size = d.shape(x)[dim]
    if d.chance(2) and size % 2 == 0:
        count = {"num_outputs": 2} if d.opset >= 18 else {}
        d.add("Split", [x], 2, axis=dim, **count)
        return
    first = d.number(1, size)
    if d.opset >= 13:
        d.add("Split", [x, d.integers(first, size - first)], 2, axis=dim)
    else:
        d.add("Split", [x], 2, axis=dim, split=[first, size - first])


def part(d: Drawing) -> None:
    x = d.pick()
    dim = d.choice(d.fixed(x))
    size = d.shape(x)[dim]
    start = d.number(size)
    step = d.choice([1, 1, 2])
    end = d.choice([d.number(start + 1, size + 1), 2**31, -1])
    if d.chance(6):
        start, end, step = -1, -(2**31), -1
    d.add("Slice", [x, *(d.integers(n) for n in (start, end, dim, step))])


def take(d: Drawing) -> None:
    """Constant places: a permutation, some of them, or one."""
    x = d.pick()
    dim = d.choice(d.fixed(x))
    size = d.shape(x)[dim]
    places: Any = list(range(size))
    d.rng.shuffle(places)
    places = d.choice([places, places[: d.number(1, size + 1)], places[0]])
    d.add("Gather", [x, d.constant(np.array(places, dtype=np.int64), "at")], axis=dim)


def pad(d: Drawing) -> None:
    x = d.pick()
    rank, dim = len(d.shape(x)), d.choice(d.fixed(x))
    pads = [0] * 2 * rank
    pads[dim], pads[rank + dim] = d.number(3), d.number(3)
    value = [] if d.plain else [d.constant(np.array(d.choice([0.0, 1.5]), d.type))]
    d.add("Pad", [x, d.integers(*pads), *value])


def stretch(d: Drawing) -> None:
    x = d.pick(1, 2, 3, 4)
    rank = len(d.shape(x))
    times = [1] * rank
    times[d.number(rank)] = d.choice([2, 3])
    if d.number(2):
        d.add("Tile", [x, d.integers(*times)])
        return
    dim = d.number(rank + 1)
    (y,) = d.add("Unsqueeze", [x, d.integers(dim)]) if d.opset >= 13 else d.add(
        "Unsqueeze", [x], axes=[dim]
    )  # fmt: skip
    sizes = [1] * (rank + 1)
    sizes[dim] = 3
    d.add("Expand", [y, d.integers(*sizes)])


def reduction(d: Drawing) -> None:
    x = d.pick(2, 3, 4)
    rank = len(d.shape(x))
    axes = sorted({d.number(rank) for _ in range(d.choice([1, 1, 2]))})
    kind = "Sum" if d.plain else d.choice(_REDUCE)
    kept = {"keepdims": d.number(2)}
    if d.opset >= (13 if kind == "Sum" else 18):
        d.add(f"Reduce{kind}", [x, d.integers(*axes)], **kept)
    else:
        d.add(f"Reduce{kind}", [x], axes=[a - d.choice([0, rank]) for a in axes], **kept)


def along(d: Drawing) -> None:
    x = d.pick()
    rank = len(d.shape(x))
    axis = d.number(rank)
    match d.number(6):
        case 0 | 1:
            d.add(d.choice(["Softmax", "LogSoftmax"]), [x], axis=d.choice([axis, axis - rank]))
        case 2:
            d.add("CumSum", [x, d.constant(np.array(axis, np.int64))])
        case 3:
            k = d.number(1, d.shape(x)[axis] + 1)
            d.add("TopK", [x, d.integers(k)], 2, axis=axis)
        case 4:
            (at,) = d.add("ArgMax", [x], axis=axis, keepdims=1)
            d.add("GatherElements", [x, at], axis=axis)
        case _:
            (at,) = d.add("ArgMax", [x], axis=rank - 1, keepdims=0)
            depth = d.integers(d.shape(x)[-1])
            (chosen,) = d.add("OneHot", [at, depth, d.constant(np.array([0, 1], d.type))])
            d.add("Mul", [chosen, x])


def images(d: Drawing) -> None:
    x = d.pick(4)
    match d.number(7):
        case 0:
            d.add("DepthToSpace", [x], blocksize=2, mode=d.choice(["DCR", "CRD"]))
        case 1:
            d.add("SpaceToDepth", [x], blocksize=2)
        case 2:
            d.add("MaxPool", [x], kernel_shape=[2, 2], strides=[d.choice([1, 2])] * 2)
        case 3:
            d.add("AveragePool", [x], kernel_shape=[2, 2], strides=[1, 1])
        case 4:
            d.add("GlobalAveragePool", [x])
        case 5:
            scales = d.constant(np.array([1, 1, 2, 2], np.float32))
            d.add("Resize", [x, "", scales], mode="nearest", nearest_mode="floor",
                  coordinate_transformation_mode="asymmetric")  # fmt: skip
        case _:
            d.add("LRN", [x], size=3)


def prelu(d: Drawing) -> None:
    x = d.pick(2, 3, 4)
    shape = d.shape(x)
    d.add("PRelu", [x, d.weight(*d.choice([(1,), (shape[1], *[1] * (len(shape) - 2))]))])


def memory(d: Drawing) -> None:
    x = d.pick(3)
    hidden, directions = d.choice([3, 4]), d.choice([1, 2])
    kind, gates = d.choice([("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    n = d.shape(x)[-1]
    w = d.weight(directions, gates * hidden, n, fan_in=n)
    r = d.weight(directions, gates * hidden, hidden, fan_in=hidden)
    bias = [d.weight(directions, 2 * gates * hidden)] if d.number(2) else []
    direction = "bidirectional" if directions == 2 else d.choice(["forward", "reverse"])
    (x,) = d.add("Transpose", [x], perm=[1, 0, 2])
    (y,) = d.add(kind, [x, w, r, *bias], hidden_size=hidden, direction=direction)
    (y,) = d.add("Transpose", [y], perm=[2, 0, 1, 3])
    d.add("Reshape", [y, d.integers(0, 0, -1)])


def attention(d: Drawing) -> None:
    """Attention by hand, fused or not, and a residual."""
    x = d.pick(3)
    n, heads, dim = d.shape(x)[-1], d.choice([1, 2, 3]), d.choice([2, 4])
    total = heads * dim
    if d.number(2):
        (fused,) = d.add("MatMul", [x, d.weight(n, 3 * total, fan_in=n)])
        ends = [(i * total, (i + 1) * total) for i in range(3)]
        parts = [d.add("Slice", [fused, *(d.integers(v) for v in (a, b, 2))])[0] for a, b in ends]
    else:
        parts = [d.add("MatMul", [x, d.weight(n, total, fan_in=n)])[0] for _ in range(3)]
    split = d.integers(0, 0, heads, dim)
    parts = [d.add("Reshape", [p, split])[0] for p in parts]
    q, k, v = (
        d.add("Transpose", [p], perm=order)[0]
        for p, order in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    (scores,) = d.add("MatMul", [q, k])
    (scores,) = d.add("Mul", [scores, d.constant(np.array(dim**-0.5, d.type))])
    (y,) = d.add("MatMul", [d.add("Softmax", [scores], axis=3 if d.opset < 13 else -1)[0], v])
    (y,) = d.add("Transpose", [y], perm=[0, 2, 1, 3])
    (y,) = d.add("Reshape", [y, d.integers(0, 0, total)])
    (y,) = d.add("MatMul", [y, d.weight(total, n, fan_in=total)])
    d.add("Add", [x, y])


def feed_forward(d: Drawing) -> None:
    x = d.pick(2, 3)
    n, width = d.shape(x)[-1], d.choice(WIDTHS)
    (y,) = d.add("MatMul", [x, d.weight(n, width, fan_in=n)])
    (y,) = d.add("Relu", [d.add("Add", [y, d.weight(width)])[0]])
    (y,) = d.add("MatMul", [y, d.weight(width, n, fan_in=width)])
    d.add("Add", [x, y])


_PLAIN_WEIGHTED = (
    (linear, 8), (conv, 6), (batch_norm, 2), (unary, 4), (clip, 1), (binary, 5), (product, 3),
    (einsum, 1), (transpose, 4), (divide, 4), (merge, 4), (squeeze, 2), (join, 4), (cut, 4),
    (part, 4), (take, 3), (pad, 2), (reduction, 2), (prelu, 1), (feed_forward, 3),
)  # fmt: skip
_WEIGHTED = (
    *_PLAIN_WEIGHTED, (norm, 6), (gate, 2), (stretch, 2), (along, 4), (images, 4), (memory, 2),
    (attention, 4), (onnx_runtime_moves.draw, 5),
)  # fmt: skip
_SHIFTS = (batch_norm, feed_forward)
_SUMS = (product, reduction)
_PLAIN = [f for f, weight in _PLAIN_WEIGHTED for _ in range(weight)]
_ALL = [f for f, weight in _WEIGHTED for _ in range(weight)]
