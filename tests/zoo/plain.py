"""Plain modules: MLPs, attention written in every common way, sharing, raw parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

HEADS, DIM, WIDTH = 4, 6, 20


class Feed(nn.Module):
    """A transformer's MLP with a residual onto its input."""

    def __init__(self, width, inner, act=F.gelu):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), act
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


def input_residual():
    return Feed(12, 30)


class Swiglu(nn.Module):
    """Gate and value in one weight."""

    def __init__(self, width=12, inner=20):
        super().__init__()
        self.stem, self.gate_up = nn.Linear(8, width), nn.Linear(width, 2 * inner, bias=False)
        self.down, self.head = nn.Linear(inner, width, bias=False), nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.head(x + self.down(F.silu(gate) * up))


def fused_gate():
    return Swiglu()


def glu():
    return nn.Sequential(nn.Linear(8, 24), nn.GLU(), nn.Linear(12, 3))


def split_heads(x, heads=HEADS):
    """[b, n, heads * dim] to [b, heads, n, dim]."""
    b, n, _ = x.shape
    return x.view(b, n, heads, -1).transpose(1, 2)


def merge_heads(x):
    """The inverse of `split_heads`."""
    b, _, n, _ = x.shape
    return x.transpose(1, 2).reshape(b, n, -1)


def attend(q, k, v):
    """Attention spelt out."""
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(DIM)
    return scores.softmax(dim=-1) @ v


def order_thd(qkv):
    """timm: three, heads, dim; permuted and unbound."""
    b, n, _ = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def order_htd(qkv):
    """NeoX and BLOOM: every head has its own q, k and v."""
    b, n, _ = qkv.shape
    q, k, v = qkv.view(b, n, HEADS, 3 * DIM).transpose(1, 2).chunk(3, dim=-1)
    return q, k, v


def order_htd_indexed(qkv):
    """Heads, three, dim, taken by index."""
    b, n, _ = qkv.shape
    x = qkv.view(b, n, HEADS, 3, DIM)
    return tuple(x[..., i, :].transpose(1, 2) for i in range(3))


def order_hdt(qkv):
    """Heads, dim, three: einops' "b n (h d t)"."""
    b, n, _ = qkv.shape
    x = qkv.reshape(b, n, HEADS, DIM, 3).permute(4, 0, 2, 1, 3)
    return x[0], x[1], x[2]


def order_indexed(qkv):
    """Three, heads, dim; qkv[0], qkv[1], qkv[2] as DINO has it."""
    b, n, _ = qkv.shape
    qkv = qkv.reshape(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def order_split(qkv):
    """GPT-2: split by size."""
    return tuple(split_heads(x) for x in qkv.split(HEADS * DIM, dim=2))


def order_sliced(qkv):
    """Slices with constant bounds."""
    inner = HEADS * DIM
    parts = qkv[..., :inner], qkv[..., inner : 2 * inner], qkv[..., 2 * inner :]
    return tuple(split_heads(x) for x in parts)


class Fused(nn.Module):
    """Attention with one projection for q, k and v, between a stem and a head."""

    def __init__(self, order, core=attend):
        super().__init__()
        self.stem, self.norm = nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.proj = nn.Linear(HEADS * DIM, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.order, self.core = order, core

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.order(self.qkv(self.norm(x)))
        return self.head(x + self.proj(merge_heads(self.core(q, k, v))))


def qkv_thd():
    return Fused(order_thd, F.scaled_dot_product_attention)


def qkv_htd():
    return Fused(order_htd)


def qkv_htd_indexed():
    return Fused(order_htd_indexed)


def qkv_hdt():
    return Fused(order_hdt)


def qkv_indexed():
    return Fused(order_indexed, F.scaled_dot_product_attention)


def qkv_split():
    return Fused(order_split)


def qkv_sliced():
    return Fused(order_sliced)


class Separate(nn.Module):
    """Attention with three projections; `core` gets them unsplit."""

    def __init__(self, core, kv_heads=HEADS):
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * DIM), nn.Linear(WIDTH, kv_heads * DIM)
        self.o = nn.Linear(HEADS * DIM, WIDTH)
        self.core = core

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(x + self.o(self.core(self.q(x), self.k(x), self.v(x))))


def by_einsum(q, k, v):
    b, n, _ = q.shape
    q, k, v = (x.reshape(b, n, HEADS, DIM) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(DIM**-0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, HEADS * DIM)


def by_flat_batch(q, k, v):
    """Heads folded into the batch, bmm: fairseq and nn.MultiheadAttention."""
    b, n, _ = q.shape
    q, k, v = (x.transpose(0, 1).reshape(n, b * HEADS, DIM).transpose(0, 1) for x in (q, k, v))
    weights = torch.bmm(q * DIM**-0.5, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).transpose(0, 1).reshape(n, b, HEADS * DIM).transpose(0, 1)


def by_grouped(q, k, v):
    """Two query heads to a key-value head, expanded."""
    b, n, _ = q.shape
    q, k, v = split_heads(q), split_heads(k, 2), split_heads(v, 2)
    k, v = (x[:, :, None].expand(b, 2, 2, n, DIM).reshape(b, HEADS, n, DIM) for x in (k, v))
    return merge_heads(attend(q, k, v))


def by_grouped_interleave(q, k, v):
    k, v = (split_heads(x, 2).repeat_interleave(2, dim=1) for x in (k, v))
    return merge_heads(F.scaled_dot_product_attention(split_heads(q), k, v, is_causal=True))


def by_grouped_kernel(q, k, v):
    y = F.scaled_dot_product_attention(
        split_heads(q), split_heads(k, 2), split_heads(v, 2), enable_gqa=True
    )
    return merge_heads(y)


def by_rotary(q, k, v):
    """Rotary halves with angles made from arange in forward."""
    q, k, v = (split_heads(x) for x in (q, k, v))
    n = q.shape[2]
    inverse = 1.0 / (100.0 ** (torch.arange(0, DIM, 2).float() / DIM))
    angles = torch.arange(n).float()[:, None] * inverse[None]
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))

    def rotate(x):
        a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    return merge_heads(attend(rotate(q), rotate(k), v))


def by_cosine(q, k, v):
    """Cosine attention: q and k of length one."""
    q, k, v = (split_heads(x) for x in (q, k, v))
    scores = 10 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return merge_heads(scores.softmax(-1) @ v)


def by_channels(q, k, v):
    """Restormer: attention between the channels of a head."""
    q, k, v = (split_heads(x).transpose(-2, -1) for x in (q, k, v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return merge_heads((scores.softmax(-1) @ v).transpose(-2, -1))


def by_linear_attention(q, k, v):
    """k and v are summed over the length first."""
    q, k, v = (split_heads(x) for x in (q, k, v))
    q, k = q.softmax(-1), k.softmax(-2)
    return merge_heads(q @ (k.transpose(-2, -1) @ v))


def attention_einsum():
    return Separate(by_einsum)


def attention_flat_batch():
    return Separate(by_flat_batch)


def attention_grouped():
    return Separate(by_grouped, 2)


def attention_grouped_interleave():
    return Separate(by_grouped_interleave, 2)


def attention_grouped_kernel():
    return Separate(by_grouped_kernel, 2)


def attention_rotary():
    return Separate(by_rotary)


def attention_cosine():
    return Separate(by_cosine)


def attention_channels():
    return Separate(by_channels)


def attention_linear():
    return Separate(by_linear_attention)


class Multihead(nn.Module):
    """nn.MultiheadAttention, self and cross."""

    def __init__(self, batch_first=True, weights=False):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 24), nn.Linear(24, 3)
        self.self_attention = nn.MultiheadAttention(24, 4, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(24, 4, batch_first=batch_first, kdim=8, vdim=8)
        self.weights = weights

    def forward(self, x):
        y = F.relu(self.stem(x))
        y = y + self.self_attention(y, y, y, need_weights=self.weights)[0]
        y = y + self.cross(y, x, x, need_weights=self.weights)[0]
        return self.head(y)


def multihead():
    return Multihead()


def multihead_weights():
    return Multihead(batch_first=False, weights=True)


class Encoder(nn.Module):
    """nn.TransformerEncoder between a stem and a head."""

    def __init__(self, norm_first, activation="relu"):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            24, 4, 32, batch_first=True, norm_first=norm_first, activation=activation
        )
        self.stem, self.head = nn.Linear(8, 24), nn.Linear(24, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.stem(x)))


def encoder_post_norm():
    return Encoder(False)


def encoder_pre_norm():
    return Encoder(True, "gelu")


class EncoderDecoder(nn.Module):
    """nn.Transformer with a causal mask."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(8, 16), nn.Linear(8, 16)
        self.body = nn.Transformer(16, 4, 1, 1, 24, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x, y):
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        y = self.body(self.inside(x), self.outside(y), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)


def encoder_decoder():
    return EncoderDecoder()


class Permuted(nn.Module):
    """Channels gathered by a constant permutation, and by one whose inverse follows."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        order = torch.tensor([5, 2, 9, 0, 11, 7, 1, 3, 8, 10, 4, 6])
        self.register_buffer("order", order)
        self.inverse = order.argsort().tolist()

    def forward(self, x):
        x = F.relu(self.one(x))[..., self.order]
        y = F.relu(self.two(x))
        return self.out(y.index_select(-1, self.order)[..., self.inverse])


def permuted():
    return Permuted()


class Reused(nn.Module):
    """One layer applied twice, and a concatenation of a value with itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Linear(8, 12), nn.Linear(12, 12)
        self.merge, self.head = nn.Linear(24, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(self.body(F.relu(self.body(F.relu(self.stem(x))))))
        return self.head(F.relu(self.merge(torch.cat([x, x], -1))))


def reused():
    return Reused()


class Tied(nn.Module):
    """Embedding and output layer share a weight; two modules share another."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.blocks = nn.ModuleList([Feed(16, 20), Feed(16, 20)])
        self.blocks[1].up.weight = self.blocks[0].up.weight
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tied():
    return Tied()


class Raw(nn.Module):
    """Parameters outside of layers: F.linear, a scale that is viewed, a stacked weight."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.zeros(12, 8)), nn.Parameter(torch.zeros(12))
        self.scale = nn.Parameter(torch.zeros(12))
        self.w2 = nn.Parameter(torch.zeros(12, 10))
        self.stacked = nn.Parameter(torch.zeros(2, 10, 10))
        self.out = nn.Parameter(torch.zeros(3, 10))

    def forward(self, x):
        x = F.relu(F.linear(x, self.w1, self.b1)) * self.scale.view(1, 1, -1)
        x = F.relu(x @ self.w2)
        x = torch.einsum("bni,oi->bno", F.relu(x @ self.stacked[0]), self.stacked[1])
        return F.linear(F.relu(x), self.out)


def raw_parameters():
    return Raw()


def frozen_layers():
    module = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(),
                           nn.Linear(16, 3))  # fmt: skip
    for layer in (module[0], module[2]):
        layer.requires_grad_(False)
    return module


class DictOutput(nn.Module):
    """Nested outputs, one of them no tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(8, 20), nn.Linear(20, 3), nn.Linear(20, 2)

    def forward(self, x):
        h = F.relu(self.stem(x))
        return {"logits": self.a(h), "boxes": [self.b(h), (self.b(h) * 2,)], "count": 3}


def dict_output():
    return DictOutput()


class WideDeep(nn.Module):
    """A linear part and an MLP whose last widths are concatenated."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(8, 6)
        self.deep = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU())
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        return self.out(torch.cat([self.wide(x), self.deep(x)], dim=-1))


def wide_deep():
    return WideDeep()


class Mixer(nn.Module):
    """MLP-Mixer: tokens are mixed, then channels."""

    def __init__(self, tokens=5, width=12):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.tokens = nn.ModuleList([
            nn.Sequential(nn.Linear(tokens, 14), nn.GELU(), nn.Linear(14, tokens))
            for _ in range(2)
        ])  # fmt: skip
        self.channels = nn.ModuleList([Feed(width, 18) for _ in range(2)])
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for norm, tokens, channels in zip(self.norms, self.tokens, self.channels, strict=True):
            x = channels(x + tokens(norm(x).transpose(1, 2)).transpose(1, 2))
        return self.head(x.mean(dim=1))


def mlp_mixer():
    return Mixer()


class PatchModel(nn.Module):
    """Patches by a strided convolution, a class token, positions, attention."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.feed, self.head = Feed(WIDTH, 30), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = merge_heads(F.scaled_dot_product_attention(*order_thd(self.qkv(x))))
        x = self.feed(x + self.scale * self.proj(y))
        return self.head(x[:, 0])


def vision_transformer():
    return PatchModel()


class Merging(nn.Module):
    """Swin: windows, attention with a table of relative positions, 2 x 2 patches merged."""

    def __init__(self, width=12, heads=3, window=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        grid = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None, :] + window - 1
        self.register_buffer("places", offset[0] * (2 * window - 1) + offset[1])
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 10, bias=False)
        self.head, self.heads, self.window = nn.Linear(10, 3), heads, window

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        s = self.window
        y = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).view(y.shape[0], s * s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.places.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        y = self.proj(y.transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, shifts=(1, 1), dims=(1, 2))
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.head(F.gelu(self.reduce(self.norm(torch.cat(parts, -1)))).mean((1, 2)))


def patch_merging():
    return Merging()


class Modulated(nn.Module):
    """DiT's block: six modulations in one weight."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.condition = nn.Linear(8, width), nn.Linear(5, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x, c):
        x = self.stem(x)
        parts = self.modulation(F.silu(self.condition(c)))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        y = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.proj(merge_heads(attend(*order_thd(self.qkv(y)))))
        y = self.norm(x) * (1 + scale2) + shift2
        return self.head(x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh")))


def adaptive_norm():
    return Modulated()


def weight_norm():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 20)), nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(20, 12), dim=1), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


class PositionalConv(nn.Module):
    """wav2vec2's grouped convolution with a norm over the kernel's places, dim=2."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv1d(3, 16, 1)
        self.conv = norm(nn.Conv1d(16, 16, 4, padding=2, groups=4), dim=2)
        self.out = nn.Conv1d(16, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.out(x + F.gelu(self.conv(x)[:, :, :-1]))


def weight_norm_grouped():
    return PositionalConv(parametrizations.weight_norm)


def weight_norm_old():
    return PositionalConv(nn.utils.weight_norm)


def spectral_norm():
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 12, 3, 1, 1)), nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(12, 8, 3, 1, 1)), nn.ReLU(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip


class HandMade(nn.Module):
    """An RMS norm, a mean-free layer and a softmax gate from elementary operators."""

    def __init__(self):
        super().__init__()
        self.stem, self.gain = nn.Linear(8, 20), nn.Parameter(torch.ones(20))
        self.up, self.down, self.head = nn.Linear(20, 24), nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, x):
        x = self.stem(x)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        y = self.up(y)
        y = (y - y.mean(-1, keepdim=True)) * y.softmax(-1)
        return self.head(x + self.down(y))


def handmade_norms():
    return HandMade()


class Constants(nn.Module):
    """Tensors made in forward: a ramp over channels, zeros that are filled, a literal scale."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        y = F.relu(self.a(x)) * torch.ones(12, dtype=x.dtype)
        z = torch.zeros(*y.shape[:2], 16, dtype=x.dtype)
        z = z + F.relu(self.b(y)) * torch.full((16,), 0.5, dtype=x.dtype)
        return self.c(z) * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)


def constants():
    return Constants()


class InPlace(nn.Module):
    """In-place operators, some on views."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = self.a(x)
        y.relu_()
        z = self.b(y).clone()
        z[..., :6] = y[..., 6:]
        z[..., 6:] += 1
        z.masked_fill_(z > 2, 2.0)
        return self.c(z)


def in_place():
    return InPlace()


class Adapter(nn.Module):
    """LoRA: a low-rank product beside a layer; a bilinear layer on top."""

    def __init__(self):
        super().__init__()
        self.base, self.down = nn.Linear(8, 16), nn.Linear(8, 4, bias=False)
        self.up, self.bilinear = nn.Linear(4, 16, bias=False), nn.Bilinear(16, 16, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        y = F.relu(self.base(x) + 0.5 * self.up(self.down(x)))
        return self.out(F.relu(self.bilinear(y, y)))


def low_rank():
    return Adapter()


class Bag(nn.Module):
    """Two tables, one of them summed by bag, and positions."""

    def __init__(self):
        super().__init__()
        self.words, self.bag = nn.Embedding(20, 12), nn.EmbeddingBag(20, 12, mode="mean")
        self.positions, self.out = nn.Embedding(5, 12), nn.Linear(12, 3)

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.words(ids) + self.positions(places)
        return self.out(F.relu(x.mean(1) + self.bag(ids)))


def embeddings():
    return Bag()
