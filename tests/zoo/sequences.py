"""Models of sequences, sets, tables and graphs from the literature, small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune


class Conformer(nn.Module):
    """Half steps of feed-forward, attention with a relative shift, a gated convolution."""

    def __init__(self, d=12, heads=3):
        super().__init__()
        self.heads, self.dim = heads, d // heads
        self.stem, self.head = nn.Linear(8, d), nn.Linear(d, 3)
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(4)])
        self.ups = nn.ModuleList([nn.Linear(d, 20) for _ in range(2)])
        self.downs = nn.ModuleList([nn.Linear(20, d) for _ in range(2)])
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.position = nn.Linear(d, d, bias=False)
        self.u, self.w = (nn.Parameter(torch.zeros(heads, d // heads)) for _ in range(2))
        self.places = nn.Parameter(torch.zeros(9, d))
        self.point1, self.point2 = nn.Conv1d(d, 2 * d, 1), nn.Conv1d(d, d, 1)
        self.depth, self.bn = nn.Conv1d(d, d, 3, padding=1, groups=d), nn.BatchNorm1d(d)

    def shift(self, x):
        """Transformer-XL's skewing of [b, h, n, 2n - 1] by padding and reshaping."""
        b, h, n, m = x.shape
        x = F.pad(x, (1, 0)).view(b, h, m + 1, n)[:, :, 1:].view(b, h, n, m)
        return x[..., :n]

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, self.dim) for f in (self.q, self.k, self.v))
        p = self.position(self.places).view(-1, self.heads, self.dim)
        content = (q + self.u).transpose(1, 2) @ k.permute(0, 2, 3, 1)
        place = (q + self.w).transpose(1, 2) @ p.permute(1, 2, 0)
        weights = ((content + self.shift(place)) * self.dim**-0.5).softmax(-1)
        return self.o((weights @ v.transpose(1, 2)).transpose(1, 2).reshape(b, n, -1))

    def convolve(self, x):
        y = F.glu(self.point1(x.transpose(1, 2)), dim=1)
        return self.point2(F.silu(self.bn(self.depth(y)))).transpose(1, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + 0.5 * self.downs[0](F.silu(self.ups[0](self.norms[0](x))))
        x = x + self.attend(self.norms[1](x))
        x = x + self.convolve(self.norms[2](x))
        x = x + 0.5 * self.downs[1](F.silu(self.ups[1](self.norms[3](x))))
        return self.head(x)


class Wave(nn.Module):
    """WaveNet: causal dilated convolutions, gates of tanh and sigmoid, sums of skips."""

    def __init__(self, width=8, skip=10):
        super().__init__()
        self.stem = nn.Conv1d(3, width, 1)
        self.filters = nn.ModuleList([nn.Conv1d(width, 12, 2, dilation=d) for d in (1, 2)])
        self.gates = nn.ModuleList([nn.Conv1d(width, 12, 2, dilation=d) for d in (1, 2)])
        self.residuals = nn.ModuleList([nn.Conv1d(12, width, 1) for _ in range(2)])
        self.skips = nn.ModuleList([nn.Conv1d(12, skip, 1) for _ in range(2)])
        self.out = nn.Conv1d(skip, 4, 1)

    def forward(self, x):
        x, total = self.stem(x), 0
        for i, (f, g, r, s) in enumerate(
            zip(self.filters, self.gates, self.residuals, self.skips, strict=True)
        ):
            y = F.pad(x, (2**i, 0))
            y = torch.tanh(f(y)) * torch.sigmoid(g(y))
            total = total + s(y)
            x = x + r(y)
        return self.out(F.relu(total))


class Perceiver(nn.Module):
    """Learnt latents attend to the input; how many there are is nobody's business but theirs."""

    def __init__(self, latents=6, d=12):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latents, d))
        self.q, self.kv, self.o = nn.Linear(d, d), nn.Linear(8, 2 * d), nn.Linear(d, d)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x):
        z = self.latents.expand(x.shape[0], -1, -1)
        k, v = self.kv(x).chunk(2, -1)
        z = z + self.o(F.scaled_dot_product_attention(self.q(z), k, v))
        return self.head(self.norm(z).mean(1))


class Alignment(nn.Module):
    """Additive attention of a decoder over an encoder's states, step by step."""

    def __init__(self, hidden=8, width=6):
        super().__init__()
        self.encoder, self.cell = nn.GRU(8, hidden, batch_first=True), nn.GRUCell(hidden, hidden)
        self.key, self.query = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width)
        self.score, self.head = nn.Linear(width, 1, bias=False), nn.Linear(2 * hidden, 3)

    def forward(self, x):
        states, last = self.encoder(x)
        h, outs = last[0], []
        for _ in range(3):
            e = self.score(torch.tanh(self.key(states) + self.query(h)[:, None]))
            context = (e.softmax(1) * states).sum(1)
            h = self.cell(context, h)
            outs.append(self.head(torch.cat([h, context], -1)))
        return torch.stack(outs, 1)


class Joint(nn.Module):
    """An RNN transducer's joint: every step of one with every step of the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 10), nn.Linear(6, 10)
        self.out = nn.Linear(10, 4)

    def forward(self, x, y):
        return self.out(torch.tanh(self.a(x)[:, :, None] + self.b(y)[:, None]))


class Variational(nn.Module):
    """Mean and variance from one head; the noise between encoder and decoder is random."""

    def __init__(self, latent=6):
        super().__init__()
        self.inside, self.moments = nn.Linear(8, 16), nn.Linear(16, 2 * latent)
        self.up, self.out = nn.Linear(latent, 14), nn.Linear(14, 8)

    def forward(self, x):
        mean, logvar = self.moments(F.relu(self.inside(x))).chunk(2, -1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar) * 0
        return self.out(F.relu(self.up(z))), mean


class Quantized(nn.Module):
    """VQ-VAE: the nearest row of a code book."""

    def __init__(self, codes=9, width=6):
        super().__init__()
        self.inside, self.book = nn.Linear(8, width), nn.Parameter(torch.zeros(codes, width))
        self.out = nn.Linear(width, 8)

    def forward(self, x):
        z = self.inside(x)
        distance = z.pow(2).sum(-1, keepdim=True) - 2 * z @ self.book.t() + self.book.pow(2).sum(-1)
        return self.out(F.embedding(distance.argmin(-1), self.book))


class Points(nn.Module):
    """PointNet: a maximum over points, and a square map that the points themselves predict."""

    def __init__(self, k=6):
        super().__init__()
        self.k = k
        self.stem, self.conv = nn.Conv1d(3, k, 1), nn.Conv1d(k, 10, 1)
        self.local, self.square = nn.Conv1d(k, 12, 1), nn.Linear(12, k * k)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        t = self.square(F.relu(self.local(x)).max(dim=2)[0])
        t = t.view(-1, self.k, self.k) + torch.eye(self.k)
        x = torch.bmm(x.transpose(2, 1), t).transpose(2, 1)
        return self.head(F.relu(self.conv(x)).amax(2))


class Radiance(nn.Module):
    """NeRF: Fourier features of the input, which join in again half way."""

    def __init__(self, width=12, levels=3):
        super().__init__()
        self.levels = levels
        inside = 3 + 3 * 2 * levels
        self.a, self.b = nn.Linear(inside, width), nn.Linear(width + inside, width)
        self.density, self.colour = nn.Linear(width, 1), nn.Linear(width, 3)

    def forward(self, x):
        scales = 2.0 ** torch.arange(self.levels)
        angles = (x[..., None] * scales).flatten(-2)
        f = torch.cat([x, angles.sin(), angles.cos()], -1)
        h = F.relu(self.b(torch.cat([F.relu(self.a(f)), f], -1)))
        return torch.cat([self.colour(h).sigmoid(), F.softplus(self.density(h))], -1)


class SpatialGate(nn.Module):
    """gMLP: half of the channels, mixed along the length, gate the other half."""

    def __init__(self, d=12, inner=20, length=5):
        super().__init__()
        self.stem, self.norm, self.up = nn.Linear(8, d), nn.LayerNorm(d), nn.Linear(d, inner)
        self.gate_norm, self.mix = nn.LayerNorm(inner // 2), nn.Conv1d(length, length, 1)
        self.down, self.head = nn.Linear(inner // 2, d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.stem(x)
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        return self.head(x + self.down(u * self.mix(self.gate_norm(v))))


class Highway(nn.Module):
    """A gate between a layer and its input, several times; embeddings of two kinds are summed."""

    def __init__(self, d=10):
        super().__init__()
        self.words, self.kinds = nn.Embedding(20, d), nn.Embedding(3, d)
        self.h = nn.ModuleList([nn.Linear(d, d) for _ in range(2)])
        self.t = nn.ModuleList([nn.Linear(d, d) for _ in range(2)])
        self.head = nn.Linear(d, 3)

    def forward(self, ids):
        x = self.words(ids) + self.kinds(ids % 3)
        for h, t in zip(self.h, self.t, strict=True):
            gate = torch.sigmoid(t(x))
            x = torch.where(gate > 0.1, gate * F.relu(h(x)) + (1 - gate) * x, x)
        return self.head(x)


class Towers(nn.Module):
    """Two towers, one of them used twice; cosine similarities and a learnt temperature."""

    def __init__(self, d=10):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, d))
        self.b = nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, d))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, y):
        u, w, v = self.a(x), self.a(x.flip(0)), self.b(y)
        cosine = F.cosine_similarity(u, w, dim=-1)
        u, v = u / u.norm(dim=-1, keepdim=True), v / v.norm(dim=-1, keepdim=True)
        return self.scale.exp() * u @ v.t(), cosine


class Interactions(nn.Module):
    """DLRM: all pairs of feature vectors multiplied, the lower triangle kept."""

    def __init__(self, d=8):
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(10, d) for _ in range(3)])
        self.bottom, self.top = nn.Linear(6, d), nn.Linear(d + 6, 10)
        self.out = nn.Linear(10, 1)

    def forward(self, x, ids):
        dense = F.relu(self.bottom(x))
        rows = [dense, *(t(ids[:, i]) for i, t in enumerate(self.tables))]
        t = torch.stack(rows, 1)
        pairs = torch.bmm(t, t.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, -1)
        return self.out(F.relu(self.top(torch.cat([dense, pairs[:, i, j]], 1))))


class Factorized(nn.Module):
    """DeepFM: the square of a sum less the sum of squares, beside an MLP of all fields."""

    def __init__(self, fields=3, d=6):
        super().__init__()
        self.table, self.linear = nn.Embedding(12, d), nn.Embedding(12, 1)
        self.mlp = nn.Sequential(nn.Linear(fields * d, 10), nn.ReLU(), nn.Linear(10, 1))

    def forward(self, ids):
        v = self.table(ids)
        second = 0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)).sum(1, keepdim=True)
        return self.linear(ids).sum(1) + second + self.mlp(v.flatten(1))


class Graph(nn.Module):
    """A graph convolution by a matrix, and messages along edges that are added up by node."""

    def __init__(self, d=10):
        super().__init__()
        self.a, self.message = nn.Linear(8, d), nn.Linear(2 * d, 12)
        self.self_loop = nn.Linear(d, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x, adjacency, edges):
        x = F.relu(adjacency @ self.a(x))
        source, target = edges
        messages = self.message(torch.cat([x[source], x[target]], -1))
        total = torch.zeros(x.shape[0], 12, dtype=x.dtype).index_add(0, target, messages)
        return self.out(F.relu(self.self_loop(x) + total))


class Hyper(nn.Module):
    """A network whose weights another network gives."""

    def __init__(self, inside=8, outside=6):
        super().__init__()
        self.sizes = inside, outside
        self.base, self.make = nn.Linear(4, 10), nn.Linear(10, outside * inside)
        self.out = nn.Linear(outside, 3)

    def forward(self, x, c):
        weight = self.make(F.relu(self.base(c))).view(-1, self.sizes[1], self.sizes[0])
        return self.out(F.relu(torch.bmm(x, weight.transpose(1, 2))))


class Scan(nn.Module):
    """A selective state space model: a projection cut in two, a causal convolution, a scan."""

    def __init__(self, d=10, inner=14, states=4, rank=3):
        super().__init__()
        self.inner, self.states, self.rank = inner, states, rank
        self.stem, self.norm = nn.Linear(8, d), nn.RMSNorm(d)
        self.into = nn.Linear(d, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select, self.step = nn.Linear(inner, rank + 2 * states), nn.Linear(rank, inner)
        self.log_a = nn.Parameter(torch.zeros(inner, states))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out, self.head = nn.Linear(inner, d, bias=False), nn.Linear(d, 3)

    def forward(self, x):
        x = self.stem(x)
        u, gate = self.into(self.norm(x)).chunk(2, -1)
        n = u.shape[1]
        u = F.silu(self.conv(u.transpose(1, 2))[..., :n].transpose(1, 2))
        dt, b, c = self.select(u).split([self.rank, self.states, self.states], -1)
        dt = F.softplus(self.step(dt))
        a = torch.exp(dt[..., None] * -torch.exp(self.log_a))
        bu = dt[..., None] * b[:, :, None] * u[..., None]
        h, ys = torch.zeros_like(bu[:, 0]), []
        for i in range(n):
            h = a[:, i] * h + bu[:, i]
            ys.append((h * c[:, i, None]).sum(-1))
        y = (torch.stack(ys, 1) + u * self.skip) * F.silu(gate)
        return self.head(x + self.out(y))


class TimeMix(nn.Module):
    """RWKV: inputs mixed with those of the step before, weighed by learnt decays."""

    def __init__(self, d=10, inner=12):
        super().__init__()
        self.stem, self.head = nn.Linear(8, d), nn.Linear(d, 3)
        self.mix = nn.Parameter(torch.zeros(3, d))
        self.k, self.v, self.r = (nn.Linear(d, inner, bias=False) for _ in range(3))
        self.decay, self.first = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        self.o = nn.Linear(inner, d, bias=False)

    def forward(self, x):
        x = self.stem(x)
        before = F.pad(x, (0, 0, 1, -1))
        xk, xv, xr = (torch.lerp(before, x, m) for m in self.mix.unbind(0))
        k, v, r = self.k(xk), self.v(xv), torch.sigmoid(self.r(xr))
        top, bottom, ys = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), []
        for i in range(x.shape[1]):
            e = torch.exp(self.first + k[:, i])
            ys.append((top + e * v[:, i]) / (bottom + e))
            w = torch.exp(-torch.exp(self.decay))
            top, bottom = w * top + k[:, i].exp() * v[:, i], w * bottom + k[:, i].exp()
        return self.head(x + self.o(r * torch.stack(ys, 1)))


class Projected(nn.Module):
    """Linformer: keys and values are shortened along the sequence."""

    def __init__(self, d=12, length=5, short=3):
        super().__init__()
        self.stem, self.qkv, self.o = nn.Linear(8, d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.e, self.head = nn.Parameter(torch.zeros(length, short)), nn.Linear(d, 3)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        k, v = (torch.einsum("bhnd,nk->bhkd", t, self.e) for t in (k, v))
        y = (q @ k.mT / 2).softmax(-1) @ v
        return self.head(x + self.o(y.transpose(1, 2).flatten(2)))


class Memory(nn.Module):
    """Memories that are compared with every step; a learnt scalar before the residual."""

    def __init__(self, d=10, slots=7):
        super().__init__()
        self.stem, self.head = nn.Linear(8, d), nn.Linear(d, 3)
        self.keys, self.values = (nn.Parameter(torch.zeros(slots, d)) for _ in range(2))
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = self.stem(x)
        y = torch.tensordot(F.softmax(x @ self.keys.T, -1), self.values, dims=1)
        return self.head(x + (self.alpha + 1) * y)


class Masked(nn.Module):
    """Layers that torch.nn.utils.prune has put masks on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        prune.random_unstructured(self.a, "weight", 0.5)
        prune.ln_structured(self.b, "weight", 0.25, n=2, dim=1)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Standardized(nn.Module):
    """A weight that has mean 0 and variance 1 in every filter."""

    def forward(self, weight):
        mean = weight.mean(dim=(1, 2), keepdim=True)
        variance = weight.var(dim=(1, 2), keepdim=True, unbiased=False)
        return (weight - mean) / torch.sqrt(variance + 1e-5)


class Parametrized(nn.Module):
    """Own parametrizations, one of them symmetric."""

    def __init__(self):
        super().__init__()
        self.conv, self.square = nn.Conv1d(3, 10, 3, padding=1), nn.Linear(10, 10, bias=False)
        parametrize.register_parametrization(self.conv, "weight", Standardized())
        parametrize.register_parametrization(self.square, "weight", Symmetric())
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        return self.out(F.relu(self.square(F.relu(self.conv(x)).transpose(1, 2))))


class Symmetric(nn.Module):
    """The upper triangle and its mirror image."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Detection(nn.Module):
    """YOLOv5's and SSD's ends: channels are anchors times outputs, all levels in one list."""

    def __init__(self, anchors=3, outputs=7):
        super().__init__()
        self.shape = anchors, outputs
        self.stem, self.down = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.heads = nn.ModuleList([nn.Conv2d(c, anchors * outputs, 1) for c in (8, 12)])
        self.register_buffer("anchors", torch.ones(2, anchors, 2))

    def forward(self, x):
        a = F.relu(self.stem(x))
        found = []
        for i, y in enumerate((a, F.relu(self.down(a)))):
            b, _, h, w = y.shape
            y = self.heads[i](y).view(b, *self.shape, h, w).permute(0, 1, 3, 4, 2).contiguous()
            xy, wh, rest = y.sigmoid().tensor_split((2, 4), 4)
            wh = (wh * 2) ** 2 * self.anchors[i].view(1, -1, 1, 1, 2)
            found.append(torch.cat((xy, wh, rest), 4).view(b, -1, self.shape[1]))
        return torch.cat(found, 1)


def ids(*shape):
    return torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(1))


def interactions():
    return torch.randn(4, 6), ids(4, 3)


def graph():
    edges = torch.tensor([[0, 1, 2, 4, 5], [1, 2, 0, 5, 3]])
    return torch.randn(6, 8), torch.rand(6, 6), edges


S = ((2, 5, 8),)
BLOCKS = [
    (Conformer, S),
    (Wave, ((2, 3, 8),)),
    (Perceiver, S),
    (Alignment, S),
    (Joint, ((2, 4, 8), (2, 3, 6))),
    (Variational, ((4, 8),)),
    (Quantized, S),
    (Points, ((2, 3, 9),)),
    (Radiance, ((6, 3),)),
    (SpatialGate, S),
    (Highway, lambda: (ids(2, 5),)),
    (Towers, ((4, 8), (4, 6))),
    (Interactions, interactions),
    (Factorized, lambda: (ids(4, 3),)),
    (Graph, graph),
    (Hyper, ((2, 5, 8), (2, 4))),
    (Scan, S),
    (TimeMix, S),
    (Projected, S),
    (Memory, S),
    (Masked, S),
    (Parametrized, ((2, 3, 6),)),
    (Detection, ((2, 3, 8, 8),)),
]
