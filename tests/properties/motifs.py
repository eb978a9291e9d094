"""More random groups of instructions: forms of blocks that published models are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from properties.families import FORMS
from properties.spellings import NOISE, SPELLINGS

if TYPE_CHECKING:
    from properties.drawing import Drawing


def form(d: Drawing) -> None:
    """A form along the last dimension, or, after a transposition, along another one."""
    _along(d, "form", list(FORMS))


def spelling(d: Drawing) -> None:
    """An operator under another name."""
    _along(d, "spelled", list(SPELLINGS))


def noise(d: Drawing) -> None:
    """Random numbers."""
    _along(d, "noisy", list(NOISE))


def _along(d: Drawing, name: str, options: list[str]) -> None:
    v = d.pick(2, 3, 4, 4)
    rank = len(d.shape(v))
    if d.number(3) == 0:
        v = d.add("transpose", (v,), rank - 1, d.number(1, rank))
    if rank - 1 in d.fixed(v):
        d.add(name, (v,), d.choice(options))


def layer(d: Drawing) -> None:
    """Whole layers with parameters of their own."""
    x = d.pick(3)
    width = d.shape(x)[-1]
    heads = d.choice([k for k in (1, 2, 3, 4) if width % k == 0])
    match d.number(8):
        case 0:
            d.add("prelu", (d.pick(2, 3, 4),))
        case 1:
            d.add("weight_norm", (d.pick(2, 3),), d.choice([4, 6, 8]))
        case 2:
            same = [v for v in d.tensors(3) if d.shape(v)[:-1] == d.shape(x)[:-1]]
            d.add("two_sided", (x, d.choice(same)), d.choice([2, 4, 6]))
        case 3:
            d.add("cell", (x,), d.choice(["lstm", "gru", "rnn"]), d.choice([3, 4, 6]))
        case 4:
            d.add("projected", (x,), d.choice([4, 6]), d.choice([2, 3]))
        case 5:
            d.add("multihead", (x,), heads)
        case 6:
            d.add("encoder_layer", (x,), heads, d.choice([4, 5, 8]))
        case _:
            d.add("scan", (x,), d.choice([2, 3]))


def grouped_fused(d: Drawing) -> None:
    """Grouped-query attention from one projection, with norms on heads."""
    x = d.pick(3)
    kv, times, dim = d.choice([1, 2, 2]), d.choice([2, 3]), d.choice([2, 4])
    heads = kv * times
    if d.number(2):  # queries of all groups, keys, values
        y = d.add("linear", (x,), (heads + 2 * kv) * dim, d.number(2) == 0)
        parts = d.add("split", (y,), (heads * dim, kv * dim, kv * dim), 2)
        q, k, v = (
            d.add("transpose", (d.add("unflatten", (d.add("get", (parts,), i),), 2, n, dim),), 1, 2)
            for i, n in enumerate((heads, kv, kv))
        )
    else:  # by group
        y = d.add("linear", (x,), kv * (times + 2) * dim, d.number(2) == 0)
        y = d.add("permute", (d.add("unflatten", (y,), 2, kv, times + 2, dim),), 0, 2, 3, 1, 4)
        parts = d.add("split", (y,), (times, 1, 1), 2)
        q, k, v = (d.add("flatten", (d.add("get", (parts,), i),), 1, 2) for i in range(3))
    if d.number(2):
        q, k = (d.add(d.choice(["rms_norm", "rms_by_hand"]), (u,)) for u in (q, k))
    if d.number(2):
        q, k = turned(d, q), turned(d, k)
    y = d.add("sdpa", (q, k, v), d.number(2) == 0, True)
    y = d.add("flatten", (d.add("transpose", (y,), 1, 2),), 2, 3)
    d.add("binary", (x, d.add("linear", (y,), d.shape(x)[-1], False)), "add")


def turned(d: Drawing, v: int) -> int:
    """Rotary embedding of neighbouring pairs, or of the first half of the dimensions only."""
    length, dim = d.shape(v)[-2:]
    if dim == 4 and d.number(2):
        parts = d.add("split", (v,), 2, 3)
        first, rest = (d.add("get", (parts,), i) for i in (0, 1))
        return d.add("cat", (turned(d, first), rest), 3)
    even, odd = (d.add("slice", (v,), 3, start, None, 2) for start in (0, 1))
    cos, sin = (d.add("buffer", (), length, dim // 2) for _ in range(2))
    a, b, c, e = (
        d.add("binary", (u, t), "mul")
        for u, t in ((even, cos), (odd, sin), (even, sin), (odd, cos))
    )
    pair = d.add("binary", (a, b), "sub"), d.add("binary", (c, e), "add")
    return d.add("flatten", (d.add("stack", pair, 4),), 3, 4)


def relative(d: Drawing) -> None:
    """Attention by hand with a table of relative positions and a mask."""
    x = d.pick(3)
    heads, dim = d.choice([2, 3]), d.choice([2, 4])
    q, k, v = (
        d.add("transpose", (d.add("unflatten", (d.add("linear", (x,), heads * dim, True),),
                                  2, heads, dim),), 1, 2)
        for _ in range(3)
    )  # fmt: skip
    scores = d.add("einsum", (q, k), "bhid,bhjd->bhij")
    scores = d.add("bias_table", (scores,), d.choice([3, 5]))
    if d.number(2):
        scores = d.add("form", (scores,), d.choice(["causal", "triu", "top mask"]))
    y = d.add("einsum", (d.add("along", (scores,), "softmax", -1), v), "bhij,bhjd->bihd")
    y = d.add("linear", (d.add("flatten", (y,), 2, 3),), d.shape(x)[-1], True)
    d.add("binary", (x, y), "add")


def linear_attention(d: Drawing) -> None:
    """Keys times values first; heads, features and values are axes of a state."""
    x = d.pick(3)
    heads, dim, width = d.choice([1, 2]), d.choice([2, 3]), d.choice([2, 4])
    q, k, v = (
        d.add("unflatten", (d.add("linear", (x,), heads * n, False),), 2, heads, n)
        for n in (dim, dim, width)
    )
    q, k = (d.add("unary", (u,), d.choice(["softplus", "relu"])) for u in (q, k))
    state = d.add("einsum", (k, v), "blhd,blhe->bhde")
    y = d.add("einsum", (q, state), "blhd,bhde->blhe")
    total = d.add("einsum", (q, d.add("reduce", (k,), "sum", (1,), False)), "blhd,bhd->blh")
    y = d.add("binary", (y, d.add("unsqueeze", (total,), 3)), "div")
    y = d.add("linear", (d.add("flatten", (y,), 2, 3),), d.shape(x)[-1], True)
    d.add("binary", (x, y), "add")


def patches(d: Drawing) -> None:
    """An image becomes tokens, perhaps with a token of their own and positions."""
    x = d.pick(4)
    width = d.choice([6, 8, 12])
    y = d.add("flatten", (d.add("conv", (x,), width, 1, 1, 2),), 2, 3)
    y = d.add("transpose", (y,), 1, 2)
    if d.number(2):
        own = d.add("expand", (d.add("param", (), 1, 1, width),), ("B", 1), -1, -1)
        y = d.add("cat", (own, y), 1)
    y = d.add("binary", (y, d.add("param", (), 1, *d.shape(y)[1:])), "add")
    d.add("layer_norm", (y,))


def windows(d: Drawing) -> None:
    """Windows of an image, shifted perhaps, something within each, and back."""
    x = d.pick(4)
    channels, height, width = d.shape(x)[1:]
    if height % 2 or width % 2 or min(height, width) < 4:
        return
    y = d.add("permute", (x,), 0, 2, 3, 1)
    shifted = d.number(2)
    if shifted:
        y = d.add("roll", (d.add("roll", (y,), 1, 1),), 1, 2)
    shape = (("B", 1), height // 2, 2, width // 2, 2, channels)
    y = d.add("permute", (d.add("reshape", (y,), *shape),), 0, 1, 3, 2, 4, 5)
    y = d.add("reshape", (y,), ("B", height * width // 4), 4, channels)
    y = d.add("linear", (y,), channels, True)
    shape = (("B", 1), height // 2, width // 2, 2, 2, channels)
    y = d.add("permute", (d.add("reshape", (y,), *shape),), 0, 1, 3, 2, 4, 5)
    y = d.add("reshape", (y,), ("B", 1), height, width, channels)
    if shifted:
        y = d.add("roll", (d.add("roll", (y,), height - 1, 1),), width - 1, 2)
    d.add("binary", (x, d.add("permute", (y,), 0, 3, 1, 2)), "add")


def merging(d: Drawing) -> None:
    """Neighbouring pixels become channels."""
    x = d.add("permute", (d.pick(4),), 0, 2, 3, 1)
    parts = [
        d.add("slice", (d.add("slice", (x,), 1, i, None, 2),), 2, j, None, 2)
        for j in (0, 1)
        for i in (0, 1)
    ]
    y = d.add("layer_norm", (d.add("cat", tuple(parts), 3),))
    d.add("linear", (y,), d.choice([4, 8]), False)


def next_block(d: Drawing) -> None:
    """Depthwise, channels last, inverted bottleneck, a learnt scale per channel."""
    x = d.pick(4)
    channels = d.shape(x)[1]
    y = d.add("permute", (d.add("conv", (x,), channels, 3, channels, 1),), 0, 2, 3, 1)
    y = d.add("linear", (d.add("layer_norm", (y,)),), d.choice([4, 8]), True)
    y = d.add("linear", (d.add("unary", (y,), "gelu"),), channels, True)
    y = d.add("binary", (y, d.add("param", (), channels)), "mul")
    d.add("binary", (x, d.add("permute", (y,), 0, 3, 1, 2)), "add")


def dense_block(d: Drawing) -> None:
    """Every layer reads what all before it have made."""
    x = d.pick(3, 4)
    made = [x]
    for _ in range(d.choice([2, 3])):
        y = d.add("cat", tuple(made), 1) if len(made) > 1 else x
        y = d.add("unary", (d.add("batch_norm", (y,)),), "relu")
        made.append(d.add("conv", (y,), d.choice([2, 3]), 3, 1, 1))
    d.add("conv", (d.add("cat", tuple(made), 1),), d.choice([4, 6]), 1, 1, 1)


def shuffle_block(d: Drawing) -> None:
    """Half of the channels pass by, the other half is computed, and both are shuffled."""
    x = d.pick(4)
    parts = d.add("chunk", (x,), 2, 1)
    left, right = (d.add("get", (parts,), i) for i in (0, 1))
    width = d.shape(left)[1]
    right = d.add("conv", (right,), d.shape(right)[1], 1, 1, 1)
    right = d.add("batch_norm", (d.add("conv", (right,), width, 3, width, 1),))
    y = d.add("cat", (left, right), 1)
    y = d.add("transpose", (d.add("unflatten", (y,), 1, 2, width),), 1, 2)
    d.add("flatten", (y,), 1, 2)


def gated_conv(d: Drawing) -> None:
    """One projection for two paths, a depthwise convolution along time, a gate."""
    x = d.pick(3)
    width = d.choice([3, 4, 6])
    y = d.add("linear", (x,), 2 * width, False)
    parts = d.add("chunk", (y,), 2, 2)
    y, gate = (d.add("get", (parts,), i) for i in (0, 1))
    y = d.add("conv", (d.add("transpose", (y,), 1, 2),), width, 3, width, 1)
    y = d.add("unary", (d.add("transpose", (y,), 1, 2),), "silu")
    if d.number(2):
        y = d.add("scan", (y,), 2)
        gate = d.add("slice", (gate,), 1, 0, d.shape(y)[1])
        y = d.add("binary", (y, d.add("unary", (gate,), "silu")), "mul")
        d.add("linear", (y,), d.shape(x)[-1], False)
        return
    y = d.add("binary", (y, d.add("unary", (gate,), "silu")), "mul")
    d.add("binary", (x, d.add("linear", (y,), d.shape(x)[-1], False)), "add")


def mixer(d: Drawing) -> None:
    """A perceptron over places, then one over features."""
    x = d.pick(3)
    y = d.add("transpose", (d.add("layer_norm", (x,)),), 1, 2)
    y = d.add("unary", (d.add("linear", (y,), d.choice([3, 5]), True),), "gelu")
    y = d.add("transpose", (d.add("linear", (y,), d.shape(x)[1], True),), 1, 2)
    x = d.add("binary", (x, y), "add")
    y = d.add("unary", (d.add("linear", (x,), d.choice([4, 6]), True),), "gelu")
    d.add("binary", (x, d.add("linear", (y,), d.shape(x)[-1], True)), "add")


def pyramid(d: Drawing) -> None:
    """Coarser and finer images, added or joined."""
    x = d.pick(4)
    if d.shape(x)[2] % 2 or d.shape(x)[3] % 2:
        return
    channels = d.shape(x)[1]
    low = d.add("conv", (x,), d.choice([4, 6]), 3, 1, 2)
    y = d.add("pool", (d.add("unary", (low,), "relu"),), "upsample")
    if d.number(2):
        y = d.add("conv", (d.add("cat", (x, y), 1),), channels, 1, 1, 1)
    else:
        y = d.add("binary", (x, d.add("conv", (y,), channels, 1, 1, 1)), "add")
    d.add("unary", (y,), "relu")


def routed(d: Drawing) -> None:
    """Experts in a loop, a low-rank update, or two layers that share a weight."""
    x = d.pick(2, 3)
    match d.number(3):
        case 0:
            x = d.add("flatten", (x,), 0, 1) if len(d.shape(x)) == 3 else x
            scores = d.add("linear", (x,), d.choice([3, 4]), False)
            y = d.add("dispatched", (x, scores), d.choice([3, 4]))
            d.add("binary", (x, y), "add")
        case 1:
            d.add("lora", (x,), d.choice([2, 3]), d.choice([4, 8]))
        case _:
            hidden = d.add("linear", (x,), d.choice([4, 6, 8]), False)
            made = len(d.steps) - 1
            d.add("tied", (d.add("unary", (hidden,), "tanh"),), made)


WEIGHTED = (
    (form, 8), (spelling, 6), (noise, 1), (layer, 3), (grouped_fused, 2), (relative, 2),
    (linear_attention, 2), (patches, 2), (windows, 2), (merging, 1), (next_block, 2),
    (dense_block, 2), (shuffle_block, 2), (gated_conv, 2), (mixer, 2), (pyramid, 2), (routed, 2),
)  # fmt: skip
