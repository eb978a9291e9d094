"""Plain modules: MLPs, attention written in every common way, sharing, raw parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

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
