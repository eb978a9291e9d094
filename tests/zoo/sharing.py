"""Plain modules: permutations, sharing, raw and constrained parameters, patches, embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from zoo.plain import DIM, HEADS, WIDTH, Feed, attend, merge_heads, order_thd


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
