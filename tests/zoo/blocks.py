"""Vision blocks from the literature: each has its own way of moving channels about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv(inside, outside, kernel=3, stride=1, groups=1, act=True):
    """Convolution, batch norm and a nonlinearity."""
    layers = [
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class Around(nn.Module):
    """A block between a stem and a pooled classifier."""

    def __init__(self, block, inside=12, outside=12):
        super().__init__()
        self.stem, self.block, self.head = conv(3, inside), block, nn.Linear(outside, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Ghost(nn.Module):
    """Half of the channels are cheap functions of the others; a surplus is cut off."""

    def __init__(self, inside=12, outside=12):
        super().__init__()
        self.outside = outside
        half = outside // 2
        self.primary, self.cheap = conv(inside, half, 1), conv(half, half, 3, groups=half)

    def forward(self, x):
        a = self.primary(x)
        return torch.cat([a, self.cheap(a)], 1)[:, : self.outside]


class MixedKernels(nn.Module):
    """MixNet: groups of channels with kernels of different sizes."""

    def __init__(self, sizes=(6, 4, 2)):
        super().__init__()
        self.sizes = list(sizes)
        self.convs = nn.ModuleList(
            [conv(c, c, k, groups=c) for c, k in zip(sizes, (3, 5, 7), strict=True)]
        )

    def forward(self, x):
        parts = torch.split(x, self.sizes, 1)
        return torch.cat([f(p) for f, p in zip(self.convs, parts, strict=True)], 1)


class Res2(nn.Module):
    """Res2Net: each part is added to the next one's input."""

    def __init__(self, width=12, scale=4):
        super().__init__()
        self.scale = scale
        self.one, self.three = conv(width, width, 1), conv(width, width, 1, act=False)
        self.convs = nn.ModuleList([conv(width // scale, width // scale) for _ in range(scale - 1)])

    def forward(self, x):
        parts = self.one(x).chunk(self.scale, 1)
        outs = [parts[0]]
        for i, f in enumerate(self.convs):
            outs.append(f(parts[i + 1] if i == 0 else parts[i + 1] + outs[-1]))
        return F.relu(self.three(torch.cat(outs, 1)) + x)


class SelectiveKernels(nn.Module):
    """SKNet: branches are stacked, and weighed by a softmax over the branches."""

    def __init__(self, width=12, hidden=8):
        super().__init__()
        self.branches = nn.ModuleList([conv(width, width, k) for k in (3, 5)])
        self.squeeze = nn.Linear(width, hidden)
        self.gates = nn.ModuleList([nn.Linear(hidden, width) for _ in range(2)])

    def forward(self, x):
        feats = torch.stack([f(x) for f in self.branches], 1)
        z = F.relu(self.squeeze(feats.sum(1).mean((2, 3))))
        weights = torch.stack([g(z) for g in self.gates], 1).softmax(1)
        return (feats * weights[..., None, None]).sum(1)


class SplitAttention(nn.Module):
    """ResNeSt: a grouped convolution of radix times the channels, an attention over the radix."""

    def __init__(self, width=12, radix=2, cardinality=2, hidden=8):
        super().__init__()
        self.radix, self.cardinality, self.width = radix, cardinality, width
        groups = radix * cardinality
        self.conv = nn.Conv2d(width, width * radix, 3, 1, 1, groups=groups)
        self.bn = nn.BatchNorm2d(width * radix)
        self.fc1 = nn.Conv2d(width, hidden, 1, groups=cardinality)
        self.fc2 = nn.Conv2d(hidden, width * radix, 1, groups=cardinality)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        b, c = x.shape[:2]
        splits = torch.split(x, c // self.radix, dim=1)
        gap = F.adaptive_avg_pool2d(sum(splits), 1)
        a = self.fc2(F.relu(self.fc1(gap)))
        a = (
            a.view(b, self.cardinality, self.radix, -1)
            .transpose(1, 2)
            .softmax(1)
            .reshape(b, -1, 1, 1)
        )
        return sum(p * s for p, s in zip(torch.split(a, c // self.radix, 1), splits, strict=True))


class Cbam(nn.Module):
    """Gates from pooled channels, then gates from the mean and maximum over channels."""

    def __init__(self, width=12):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1))
        self.spatial = nn.Conv2d(2, 1, 3, 1, 1)

    def forward(self, x):
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * gate.sigmoid()
        pooled = torch.cat([x.mean(1, keepdim=True), torch.max(x, 1, keepdim=True)[0]], 1)
        return x * self.spatial(pooled).sigmoid()


class EfficientChannels(nn.Module):
    """ECA: a convolution along the channels, whose places then matter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        return x * self.conv(y).transpose(-1, -2).unsqueeze(-1).sigmoid()


class Coordinates(nn.Module):
    """Coordinate attention: pooled rows and columns, concatenated and split again."""

    def __init__(self, width=12, hidden=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden)
        self.rows, self.columns = nn.Conv2d(hidden, width, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x):
        h, w = x.shape[2:]
        y = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)], 2)
        y = F.hardswish(self.norm(self.conv(y)))
        a, b = torch.split(y, [h, w], dim=2)
        return x * self.rows(a).sigmoid() * self.columns(b.permute(0, 1, 3, 2)).sigmoid()


class NonLocal(nn.Module):
    """Attention over places by reshapes, with a smaller inner width."""

    def __init__(self, width=12, inner=6):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, width, 1)

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = (f(x).view(b, -1, h * w) for f in (self.theta, self.phi, self.g))
        y = (q.permute(0, 2, 1) @ k).softmax(-1) @ v.permute(0, 2, 1)
        return x + self.out(y.permute(0, 2, 1).contiguous().view(b, -1, h, w))


class RepVgg(nn.Module):
    """Three branches, one of them only a norm."""

    def __init__(self, width=12):
        super().__init__()
        self.dense, self.point = conv(width, width, 3, act=False), conv(width, width, 1, act=False)
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))


class PoolMixer(nn.Module):
    """PoolFormer: a pool less its input, layer scales, a group norm of one group."""

    def __init__(self, width=12):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.up, self.down = nn.Conv2d(width, 20, 1), nn.Conv2d(20, width, 1)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.scale1.unsqueeze(-1).unsqueeze(-1) * (self.pool(y) - y)
        return x + self.scale2[:, None, None] * self.down(F.gelu(self.up(self.norm2(x))))


class Aspp(nn.Module):
    """Dilated branches and a pooled one that is stretched again."""

    def __init__(self, width=12, out=12):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, 6, 3, 1, r, dilation=r) for r in (1, 2, 3)])
        self.pooled, self.project = nn.Conv2d(width, 6, 1), conv(24, out, 1)

    def forward(self, x):
        pooled = F.interpolate(
            self.pooled(F.adaptive_avg_pool2d(x, 1)), size=x.shape[-2:], mode="bilinear"
        )
        return self.project(torch.cat([*(f(x) for f in self.convs), pooled], 1))


class FusedPyramid(nn.Module):
    """BiFPN: levels are summed with learnt, normalised weights; the head is shared."""

    def __init__(self, width=12):
        super().__init__()
        self.down, self.a, self.b = conv(width, width, 3, 2), conv(width, width), conv(width, width)
        self.weights = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        low = self.down(x)
        w = F.relu(self.weights)
        w = w / (w.sum(1, keepdim=True) + 1e-4)
        high = self.a(w[0, 0] * x + w[0, 1] * F.interpolate(low, scale_factor=2))
        low = self.b(w[1, 0] * low + w[1, 1] * F.max_pool2d(high, 2))
        return self.head(high) + F.interpolate(self.head(low), scale_factor=2)


class ModulatedConv(nn.Module):
    """StyleGAN: every image has its own kernel, applied as one grouped convolution."""

    def __init__(self, inside=12, outside=10):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, outside, inside, 3, 3))
        self.style, self.out = nn.Linear(inside, inside), nn.Conv2d(outside, 12, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        style = self.style(x.mean((2, 3))).view(b, 1, c, 1, 1)
        weight = self.weight * (style + 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        weight = weight.view(-1, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.out(F.leaky_relu(y.view(b, -1, h, w), 0.2))


class DynamicConv(nn.Module):
    """A softmax over four kernels, mixed for every image."""

    def __init__(self, inside=12, outside=12, kernels=4):
        super().__init__()
        self.bank = nn.Parameter(torch.zeros(kernels, outside, inside, 3, 3))
        self.gate = nn.Sequential(nn.Linear(inside, 6), nn.SiLU(), nn.Linear(6, kernels))

    def forward(self, x):
        b, c, h, w = x.shape
        mix = self.gate(x.mean((2, 3))).softmax(-1)
        weight = torch.einsum("bk,koihw->boihw", mix, self.bank).reshape(-1, c, 3, 3)
        y = F.conv2d(x.reshape(1, -1, h, w), weight, padding=1, groups=b)
        return y.reshape(b, -1, h, w)


class Fourier(nn.Module):
    """GFNet and FNO: a product in the frequency domain, with a complex weight."""

    def __init__(self, width=12, side=8):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, side, side // 2 + 1, 2))
        self.point = nn.Conv2d(width, width, 1)

    def forward(self, x):
        y = torch.fft.rfft2(x, dim=(2, 3), norm="ortho") * torch.view_as_complex(self.weight)
        y = torch.fft.irfft2(y, s=x.shape[2:], dim=(2, 3), norm="ortho")
        return F.gelu(y + self.point(x))


class Unfolded(nn.Module):
    """A convolution by unfold and a matrix product, folded back."""

    def __init__(self, width=12, out=10):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.zeros(out, width * 9)), nn.Conv2d(out, 12, 1)

    def forward(self, x):
        b, _, h, w = x.shape
        columns = F.unfold(x, 3, padding=1)
        return self.out(F.relu((self.weight @ columns).view(b, -1, h, w)))


class Sampled(nn.Module):
    """A spatial transformer: an affine grid from the features, sampled bilinearly."""

    def __init__(self, width=12):
        super().__init__()
        self.where = nn.Linear(width, 6)
        self.conv = conv(width, width)

    def forward(self, x):
        theta = self.where(x.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.conv(F.grid_sample(x, grid, align_corners=False))


class Unpooled(nn.Module):
    """SegNet: maxima are put back where they were."""

    def __init__(self, width=12):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x):
        y, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(self.conv(y), places, 2, output_size=x.shape[2:])


class Rrdb(nn.Module):
    """ESRGAN: dense concatenations inside a scaled residual; reflection padding."""

    def __init__(self, width=12, growth=4):
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(width + i * growth, growth, 3, 1, 1, padding_mode="reflect")
             for i in range(2)]
        )  # fmt: skip
        self.last = nn.Conv2d(width + 2 * growth, width, 3, 1, 1)

    def forward(self, x):
        feats = [x]
        for f in self.convs:
            feats.append(F.leaky_relu(f(torch.cat(feats, 1)), 0.2))
        return x + 0.2 * self.last(torch.cat(feats, 1))


class ChannelShuffle(nn.Module):
    """The layer of torch.nn for it, a local response norm and a softmax over channels."""

    def __init__(self, width=12):
        super().__init__()
        self.one, self.shuffle = nn.Conv2d(width, width, 1, groups=2), nn.ChannelShuffle(2)
        self.two = nn.Conv2d(width, width, 3, 1, 1, groups=width)

    def forward(self, x):
        return F.softmax(self.two(self.shuffle(F.relu(self.one(x)))), 1)


class ResponseNorm(nn.Module):
    """AlexNet's norm over neighbouring channels: their order matters."""

    def __init__(self, width=12):
        super().__init__()
        self.norm, self.conv = nn.LocalResponseNorm(3), conv(width, width)

    def forward(self, x):
        return self.conv(self.norm(x))


def around(block, **options):
    """The block of a class between stem and head."""
    return lambda: Around(block(), **options)


BLOCKS = [Ghost, MixedKernels, Res2, SelectiveKernels, SplitAttention, Cbam, EfficientChannels,
          Coordinates, NonLocal, RepVgg, PoolMixer, Aspp, FusedPyramid, ModulatedConv, DynamicConv,
          Fourier, Unfolded, Sampled, Unpooled, Rrdb, ChannelShuffle, ResponseNorm]  # fmt: skip
