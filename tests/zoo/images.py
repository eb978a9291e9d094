"""Networks on images that do more than stack convolutions, small and with random weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.convolutional import Basic, ConvUnit


class Implicit(nn.Module):
    """YOLOv7's ImplicitA and ImplicitM: raw parameters added to and multiplied with channels."""

    def __init__(self):
        super().__init__()
        self.stem = ConvUnit(3, 12, 3)
        self.conv = ConvUnit(12, 10, 3)
        self.add = nn.Parameter(torch.zeros(1, 10, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.head = nn.Conv2d(10, 6, 1)

    def forward(self, x):
        return self.head(self.conv(self.stem(x)) + self.add) * self.scale


def yolo_implicit():
    return Implicit()


def pixel_shuffle():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(4, 12, 3, 1, 1),
        nn.PixelUnshuffle(2), nn.Conv2d(48, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip


class SpaceToDepth(nn.Module):
    """Focus: strided slices of the channels, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.conv = nn.Conv2d(32, 10, 1)
        self.out = nn.Conv2d(10, 3, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        parts = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.out(F.relu(self.conv(torch.cat(parts, 1))))


def space_to_depth():
    return SpaceToDepth()


def depth_multiplier():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 24, 3, 1, 1, groups=8),
        nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 4, 1),
    )  # fmt: skip


def transposed_grouped():
    return nn.Sequential(
        nn.ConvTranspose2d(3, 12, 2, 2), nn.ReLU(), nn.ConvTranspose2d(12, 8, 3, 2, 1, groups=4),
        nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )  # fmt: skip


def instance_norm():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1),
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        nn.ReLU(), nn.Conv2d(12, 8, 3, 1, 1), nn.InstanceNorm2d(8), nn.LeakyReLU(0.1),
        nn.Conv2d(8, 6, 3, 1, 1), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 3, 1),
    )  # fmt: skip


def single_output():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 1, 3, 1, 1), nn.Sigmoid(),
        nn.Conv2d(1, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 1, 1),
    )  # fmt: skip


class FrozenBatchNorm(nn.Module):
    """torchvision's: everything is a buffer."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x):
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


def frozen_batch_norm():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1), FrozenBatchNorm(12), nn.ReLU(inplace=True),
        nn.Conv2d(12, 4, 1),
    )  # fmt: skip


def flattened():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 16, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


class Decoder(nn.Module):
    """Linear, view into an image, transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 10 * 4 * 4)
        self.up1, self.up2 = nn.ConvTranspose2d(10, 8, 2, 2), nn.ConvTranspose2d(8, 3, 2, 2)

    def forward(self, z):
        x = F.relu(self.fc(z)).view(-1, 10, 4, 4)
        return torch.tanh(self.up2(F.relu(self.up1(x))))


def linear_to_image():
    return Decoder()


class HighResolution(nn.Module):
    """HRNet: two resolutions that are exchanged by sums, twice, and concatenated at the end."""

    def __init__(self, a=8, b=12):
        super().__init__()
        self.stem = ConvUnit(3, a, 3)
        self.down = nn.Conv2d(a, b, 3, 2, 1)
        self.high = nn.ModuleList([Basic(a, a), Basic(a, a)])
        self.low = nn.ModuleList([Basic(b, b), Basic(b, b)])
        self.to_high = nn.ModuleList([nn.Conv2d(b, a, 1), nn.Conv2d(b, a, 1)])
        self.to_low = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1), nn.Conv2d(a, b, 3, 2, 1)])
        self.head = nn.Sequential(nn.Conv2d(a + b, 10, 1), nn.ReLU(), nn.Conv2d(10, 4, 1))

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.down(x))
        for i in range(2):
            x, y = self.high[i](x), self.low[i](y)
            up = F.interpolate(self.to_high[i](y), size=x.shape[-2:], mode="nearest")
            x, y = F.relu(x + up), F.relu(y + self.to_low[i](x))
        y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=True)
        return self.head(torch.cat([x, y], 1))


def hrnet():
    return HighResolution()


class Attention2d(nn.Module):
    """A transformer block of a diffusion U-Net: group norm, self- and cross-attention, GEGLU."""

    def __init__(self, channels, context, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.proj_in, self.proj_out = (
            nn.Conv2d(channels, channels, 1),
            nn.Linear(channels, channels),
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = nn.ModuleDict(self._projections(channels, channels))
        self.cross_attention = nn.ModuleDict(self._projections(channels, context))
        self.gate = nn.Linear(channels, 24 * 2)
        self.down = nn.Linear(24, channels)

    def _projections(self, channels, context):
        inner = 16
        return {
            "q": nn.Linear(channels, inner, bias=False),
            "k": nn.Linear(context, inner, bias=False),
            "v": nn.Linear(context, inner, bias=False),
            "out": nn.Linear(inner, channels),
        }

    def attend(self, m, x, context):
        b = x.shape[0]
        q, k, v = m["q"](x), m["k"](context), m["v"](context)
        dim = q.shape[-1] // self.heads
        q, k, v = (t.view(b, -1, self.heads, dim).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return m["out"](y.transpose(1, 2).reshape(b, -1, self.heads * dim))

    def forward(self, x, context):
        b, c, h, w = x.shape
        skip = x
        x = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, c)
        y = self.norm1(x)
        x = x + self.attend(self.self_attention, y, y)
        x = x + self.attend(self.cross_attention, self.norm2(x), context)
        value, gate = self.gate(self.norm3(x)).chunk(2, dim=-1)
        x = x + self.down(value * F.gelu(gate))
        x = self.proj_out(x).reshape(b, h, w, c).permute(0, 3, 1, 2)
        return x + skip


class TimeBlock(nn.Module):
    """Residual block with a scale and a shift from the time embedding."""

    def __init__(self, inside, outside, time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inside), nn.Conv2d(inside, outside, 3, 1, 1)
        self.time = nn.Linear(time, 2 * outside)
        self.norm2, self.conv2 = nn.GroupNorm(4, outside), nn.Conv2d(outside, outside, 3, 1, 1)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x, t):
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, dim=1)
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))


class DiffusionUNet(nn.Module):
    def __init__(self, a=8, b=16, time=12, context=10):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, a, 3, 1, 1)
        self.down1, self.shrink = TimeBlock(a, a, time), nn.Conv2d(a, a, 3, 2, 1)
        self.down2, self.attention = TimeBlock(a, b, time), Attention2d(b, context)
        self.up2, self.grow = TimeBlock(b + a, b, time), nn.Conv2d(b, b, 3, 1, 1)
        self.up1 = TimeBlock(b + a, a, time)
        self.norm, self.out = nn.GroupNorm(4, a), nn.Conv2d(a, 3, 3, 1, 1)

    def forward(self, x, t, context):
        half = 4
        freqs = torch.exp(-torch.arange(half, dtype=torch.float32) * 2.3 / half)
        angles = t[:, None] * freqs[None]
        t = self.embed(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))
        a = self.down1(self.stem(x), t)
        shrunk = self.shrink(a)
        b = self.attention(self.down2(shrunk, t), context)
        b = self.up2(torch.cat([b, shrunk], dim=1), t)
        b = self.grow(F.interpolate(b, scale_factor=2.0, mode="nearest"))
        y = self.up1(torch.cat([b, a], dim=1), t)
        return self.out(F.silu(self.norm(y)))


def diffusion_unet():
    return DiffusionUNet()
