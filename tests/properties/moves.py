"""Single random instructions, by family. A move that doesn't fit raises; the caller goes on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from properties.operators import ALONG, BINARY, REDUCE, UNARY

if TYPE_CHECKING:
    from properties.drawing import Drawing

WIDTHS = [2, 3, 4, 6, 8, 12, 16, 24]


def linear(d: Drawing) -> None:
    v = d.pick()
    name = d.choice(["linear", "linear", "linear", "bilinear"])
    d.add(name, (v,), d.choice(WIDTHS), *([d.number(2) == 0] * (name == "linear")))


def again(d: Drawing) -> None:
    """A module or a weight of an earlier instruction, once more."""
    made = [i for i, s in enumerate(d.steps) if s[0] in ("linear", "layer_norm", "conv")]
    tables = [i for i, s in enumerate(d.steps) if s[0] in ("linear", "embedding")]
    if d.number(2) and made:
        index = d.choice(made)
        v = d.steps[index][1][0] if d.number(2) else d.pick()
        d.add("reuse", (v,), index)
    elif tables:
        index = d.choice(tables)
        fits = [v for v in d.tensors() if d.shape(v)[-1:] and d.shape(v)[-1] in _widths(d, index)]
        if fits:
            d.add("tied", (d.choice(fits),), index)


def _widths(d: Drawing, index: int) -> tuple[int, ...]:
    return tuple(getattr(d.net, f"m{index}").weight.shape)


def conv(d: Drawing) -> None:
    v = d.pick(3, 4)
    channels = d.shape(v)[1]
    kind = d.choice(["plain", "plain", "grouped", "depthwise", "transposed"])
    groups = 1
    out = d.choice(WIDTHS)
    if kind == "depthwise":
        groups, out = channels, channels * d.choice([1, 1, 2])
    elif kind == "grouped" or (kind == "transposed" and d.number(2)):
        groups = d.choice(divisors(channels))
        out = groups * d.choice([1, 2, 3, 4])
    if kind == "transposed":
        d.add("conv_transpose", (v,), out, d.choice([1, 2]), groups)
    else:
        d.add("conv", (v,), out, d.choice([1, 3]), groups, d.choice([1, 1, 2]))


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def product(d: Drawing) -> None:
    """A matrix product with whatever fits, transposed if need be."""
    a = d.pick(2, 3, 4)
    fits = []
    for b in d.tensors(2, 3, 4):
        x, y = d.shape(a), d.shape(b)
        if x[-1] == y[-1]:
            fits.append((b, True))
        if x[-1] == y[-2]:
            fits.append((b, False))
    b, turned = d.choice(fits)
    if turned:
        rank = len(d.shape(b))
        b = d.add("transpose", (b,), rank - 2, rank - 1)
    d.add("matmul", (a, b))


def einsum(d: Drawing) -> None:
    a, b = d.pick(2, 3, 4), d.pick(1, 2, 3, 4)
    x, y = d.shape(a), d.shape(b)
    letters = "abcdefgh"
    left = list(letters[: len(x)])
    right = []
    for i, n in enumerate(y):
        same = [c for c, m in zip(left, x, strict=True) if m == n and c not in right]
        right.append(d.choice(same) if same and d.number(4) else letters[len(x) + i])
    everything = [*dict.fromkeys(left + right)]
    out = [c for c in everything if c in "a" or d.number(3)]
    d.rng.shuffle(out)
    d.add("einsum", (a, b), f"{''.join(left)},{''.join(right)}->{''.join(out)}")


def merge(d: Drawing) -> None:
    """Two or three neighbouring dimensions become one."""
    v = d.pick(2, 3, 4, 5)
    shape, fixed = d.shape(v), d.fixed(v)
    start = d.number(len(shape) - 1)
    stop = min(len(shape), start + d.choice([2, 2, 3]))
    if d.number(2):
        d.add("flatten", (v,), start, stop - 1)
        return
    size = math.prod(shape[start:stop])
    varies = any(i not in fixed for i in range(start, stop))
    batch = d.inputs[0][2] if d.inputs[0][0] == "ids" else d.inputs[0][0]

    def given(i: int) -> object:
        return shape[i] if i in fixed else ("B", shape[i] // batch)

    merged = (-1 if d.number(2) else ("B", size // batch)) if varies else size
    d.add("reshape", (v,), *map(given, range(start)), merged,
          *map(given, range(stop, len(shape))))  # fmt: skip


def divide(d: Drawing) -> None:
    """One dimension becomes two."""
    v = d.pick(2, 3, 4)
    dim = d.choice(d.fixed(v))
    size = d.shape(v)[dim]
    front = d.choice([k for k in divisors(size) if 1 < k < size])
    d.add("unflatten", (v,), dim, front, size // front)


def regroup(d: Drawing) -> None:
    """All dimensions but those of the batch in a new grouping, aligned with the old or not."""
    v = d.pick(2, 3, 4)
    fixed = d.fixed(v)
    if not fixed:
        return
    first = fixed[0]
    if fixed != list(range(first, len(d.shape(v)))) or first > 1:
        return
    size = math.prod(d.shape(v)[first:])
    a = d.choice(divisors(size))
    b = d.choice(divisors(size // a))
    lead = [-1] if first else []
    d.add("reshape", (v,), *lead, *(n for n in (a, b, size // a // b) if n != 1))


def permute(d: Drawing) -> None:
    v = d.pick(2, 3, 4, 5)
    rank = len(d.shape(v))
    if d.number(2):
        d.add("transpose", (v,), d.number(rank), d.number(rank))
        return
    order = list(range(rank))
    d.rng.shuffle(order)
    d.add("permute", (v,), *order)


def stretch(d: Drawing) -> None:
    """expand, repeat, repeat_interleave."""
    v = d.pick(1, 2, 3, 4)
    shape = d.shape(v)
    rank = len(shape)
    dim = d.number(rank)
    match d.number(4):
        case 0:
            v = d.add("unsqueeze", (v,), dim)
            n = d.choice([2, 3, 4])
            v = d.add("expand", (v,), *(n if i == dim else -1 for i in range(rank + 1)))
            if dim in d.fixed(v):
                d.add("flatten", (v,), dim, dim + 1)
        case 1:
            d.add("repeat", (v,), *(2 if i == dim else 1 for i in range(rank)))
        case 2:
            d.add("repeat_interleave", (v,), d.choice([2, 3]), dim)
        case 3:
            d.add("repeat", (v,), d.choice([1, 2]), *(1 for _ in shape))


def join(d: Drawing) -> None:
    """cat along one dimension, stack along a new one."""
    a = d.pick()
    x = d.shape(a)
    if d.number(3) == 0:
        fits = [v for v in d.tensors() if d.shape(v) == x]
        b = d.choice(fits)
        d.add("stack", (a, b), d.number(len(x) + 1))
        return
    dim = d.number(len(x))
    fits = [
        v
        for v in d.tensors(len(x))
        if all(i == dim or m == n for i, (m, n) in enumerate(zip(x, d.shape(v), strict=True)))
    ]
    d.add("cat", (a, *(d.choice(fits) for _ in range(d.choice([1, 1, 2])))), dim)


def cut(d: Drawing) -> None:
    """split, chunk, unbind, and all pieces or some of them."""
    v = d.pick()
    dim = d.choice(d.fixed(v))
    size = d.shape(v)[dim]
    match d.number(4):
        case 0:
            sizes = []
            while sum(sizes) < size:
                sizes.append(d.number(1, size - sum(sizes) + 1))
            pieces = d.add("split", (v,), tuple(sizes), dim)
        case 1:
            pieces = d.add("split", (v,), d.number(1, size), dim)
        case 2:
            pieces = d.add("chunk", (v,), d.choice([2, 2, 3, 4]), dim)
        case _:
            pieces = d.add("unbind", (v,), dim)
    n = len(d.values[pieces][0])
    for _ in range(d.choice([1, 2, 3])):
        d.add("get", (pieces,), d.number(n))


def part(d: Drawing) -> None:
    """slice, strided or not, select, pad."""
    v = d.pick()
    dim = d.choice(d.fixed(v))
    size = d.shape(v)[dim]
    match d.number(5):
        case 0:
            start = d.number(size)
            d.add("slice", (v,), dim, start, d.number(start + 1, size + 1))
        case 1:
            step = d.choice([2, 2, 3])
            stop = d.choice([None, None, size - 1])
            d.add("slice", (v,), dim, d.number(step), stop, step)
        case 2:
            d.add("slice", (v,), dim, *d.choice([(-size // 2, None), (None, -1), (1, None)]))
        case 3:
            d.add("select", (v,), dim, d.choice([0, -1, size - 1]))
        case _:
            rank = len(d.shape(v))
            back = rank - 1 - dim
            amounts = (0, 0) * back + (d.number(3), d.number(3))
            d.add("pad", (v,), amounts, "constant", d.choice([0.0, 0.0, 1.5]))


def shuffle(d: Drawing) -> None:
    """Constant re-indexing, flip, roll, pixel shuffles."""
    v = d.pick()
    dim = d.choice(d.fixed(v))
    size = d.shape(v)[dim]
    match d.number(5):
        case 0:
            places = list(range(size))
            d.rng.shuffle(places)
            d.add("take", (v,), dim, tuple(places))
        case 1:
            d.add("flip", (v,), dim)
        case 2:
            d.add("roll", (v,), d.number(1, size), dim)
        case 3:
            d.add("pixel_shuffle", (d.pick(4),), 2)
        case _:
            d.add("pixel_unshuffle", (d.pick(4),), 2)


def unary(d: Drawing) -> None:
    d.add("unary", (d.pick(),), d.choice(list(UNARY)))


def binary(d: Drawing) -> None:
    """Two values that broadcast, the same shape preferred."""
    a = d.pick()
    x = d.shape(a)
    same = [v for v in d.tensors() if d.shape(v) == x and v != a]
    fits = [v for v in d.tensors() if _broadcast(x, d.shape(v))]
    b = d.choice(same if same and d.number(3) else fits)
    name = d.choice([*BINARY, "add", "add", "add", "mul"])
    d.add("binary", (a, b) if d.number(2) else (b, a), name)


def _broadcast(x: tuple[int, ...], y: tuple[int, ...]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(x), reversed(y), strict=False))


def reduction(d: Drawing) -> None:
    v = d.pick(2, 3, 4, 5)
    rank = len(d.shape(v))
    dims = sorted({d.number(rank) for _ in range(d.choice([1, 1, 2]))})
    d.add("reduce", (v,), d.choice(list(REDUCE)), tuple(dims), d.number(2) == 0)


def along(d: Drawing) -> None:
    v = d.pick()
    dim = d.number(len(d.shape(v)))
    match d.number(8):
        case 0:
            d.add("topk", (v,), d.number(1, d.shape(v)[dim] + 1), dim)
        case 1:
            d.add("tril", (d.pick(2, 3, 4),))
        case 2 | 3:
            d.add("glu", (v,), dim)
        case _:
            d.add("along", (v,), d.choice(list(ALONG)), dim)


def norm(d: Drawing) -> None:
    match d.number(7):
        case 0:
            v = d.pick(2, 3, 4)
            n = d.choice([1, 1, 1, 2])
            d.add("layer_norm", (v,), n, d.number(3) > 0)
        case 1:
            d.add("rms_norm", (d.pick(),))
        case 2:
            d.add("rms_by_hand", (d.pick(),))
        case 3 | 4:
            v = d.pick(2, 3, 4)
            d.add("group_norm", (v,), d.choice(divisors(d.shape(v)[1])))
        case 5:
            d.add("batch_norm", (d.pick(2, 3, 4),))
        case _:
            d.add("instance_norm", (d.pick(3, 4),))


def constant(d: Drawing) -> None:
    """A raw parameter or buffer that something else can be added to or multiplied by."""
    x = d.shape(d.pick())
    x = x[d.number(len(x)) :] if x else x
    name = d.choice(["param", "param", "buffer"])
    v = d.add(name, (), *(n if d.number(6) else 1 for n in x))
    fits = [u for u in d.tensors() if _broadcast(d.shape(u), d.shape(v)) and u != v]
    d.add("binary", (d.choice(fits), v), d.choice(["add", "mul"]))


def table(d: Drawing) -> None:
    ids = [i for i, v in enumerate(d.values) if not isinstance(v[0], tuple)
           and not v[0].is_floating_point()]  # fmt: skip
    if ids:
        v = d.choice(ids)
        d.add("embedding", (v,), d.inputs[v][1], d.choice(WIDTHS))


def place(d: Drawing) -> None:
    """Places as values."""
    v = d.pick()
    shape = d.shape(v)
    last = shape[-1] if shape else 0
    match d.number(7):
        case 0:
            d.add("gates", (v,), d.number(1, last + 1))
        case 1:
            dim = d.choice(d.fixed(v))
            d.add("gather_best", (v,), d.number(1, shape[dim] + 1), dim)
        case 2:
            d.add("one_hot_best", (v,))
        case 3:
            if len(shape) - 1 in d.fixed(v):  # a table has a fixed number of rows
                d.add("best_row", (v,))
        case 4:
            if len(shape) - 2 in d.fixed(v):
                d.add("positions", (v,))
        case 5:
            d.add("ordered", (v,), d.choice(d.fixed(v)))
        case _:
            same = [u for u in d.tensors() if d.shape(u) == shape]
            d.add("masked", (v, d.choice(same)))


def weight(d: Drawing) -> None:
    """Weights that are computed, and linear maps in other forms."""
    v = d.pick()
    shape = d.shape(v)
    match d.number(8):
        case 0:
            d.add("affine", (d.pick(2),), d.choice(WIDTHS))
        case 1:
            d.add("scaled", (v,), *d.choice([(), (1,)]))
        case 2:
            d.add("standardised_conv", (d.pick(4),), d.choice(WIDTHS), d.choice([1, 3]))
        case 3 | 4:
            d.add("weight_normed", (v,), d.choice(WIDTHS))
        case 5:
            fits = [
                u for u in d.tensors(2) if d.shape(u)[-1:] == shape[-1:] and len(d.fixed(u)) == 2
            ]
            d.add("linear_by", (v, d.choice(fits)))
        case 6:
            same = [u for u in d.tensors() if d.shape(u) == shape]
            d.add("dotted", (v, d.choice(same)))
        case _:
            d.add("diagonal_scale", (v,))


def writing(d: Drawing) -> None:
    """Operators that write in place."""
    v = d.pick()
    if d.number(4):  # the other one takes torch's functionalisation, which is slow
        d.add("in_place", (v,))
        return
    dim = d.choice(d.fixed(v))
    start = d.number(d.shape(v)[dim])
    d.add("overwritten", (v,), dim, start, d.number(start + 1, d.shape(v)[dim] + 1))


def spatial(d: Drawing) -> None:
    d.add("pool", (d.pick(3, 4),), d.choice(["avg", "max", "adaptive", "upsample"]))


WEIGHTED = (
    (linear, 8), (again, 2), (conv, 6), (product, 3), (einsum, 2), (merge, 4), (divide, 5),
    (regroup, 2), (permute, 4), (stretch, 3), (join, 4), (cut, 4), (part, 4), (shuffle, 3),
    (unary, 4), (binary, 8), (reduction, 3), (along, 3), (norm, 5), (constant, 3), (table, 1),
    (spatial, 1), (place, 3), (weight, 4), (writing, 1),
)  # fmt: skip
