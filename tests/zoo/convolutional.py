"""Convolutional families, small and with random weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Basic(nn.Module):
    """Residual block of two convolutions; "pad" shortcuts have no parameters."""

    def __init__(self, inside, outside, stride=1, shortcut="conv", groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False, groups=groups)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.extra = (outside - inside) // 2
        self.downsample = None
        if inside != outside and shortcut == "conv":
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        y += x
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped for ResNeXt), 1x1."""

    def __init__(self, inside, width, outside, groups=1, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False, groups=groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.downsample = None
        if inside != outside:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stem, two stages, pooled classifier."""

    def __init__(self, *blocks, stem=8, width=16):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, 1, 1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.layers = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.layers(self.stem(x))), 1))


def resnet_basic():
    return ResNet(Basic(8, 8), Basic(8, 16, 2), Basic(16, 16))


def resnet_padded():
    return ResNet(Basic(8, 8), Basic(8, 16, 2, "pad"), Basic(16, 16))


def resnet_bottleneck():
    return ResNet(Bottleneck(8, 4, 16), Bottleneck(16, 6, 16))


def resnext():
    return ResNet(Bottleneck(8, 12, 16, groups=4), Bottleneck(16, 12, 16, groups=4))


class SqueezeExcitation(nn.Module):
    """Channel gates from pooled channels."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        gate = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-excitation, project; a skip where shapes allow."""

    def __init__(self, inside, expanded, outside, stride, act, squeezed):
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(inside, expanded, 1, bias=False), nn.BatchNorm2d(expanded), act()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(expanded, expanded, 3, stride, 1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            act(),
        )
        self.se = SqueezeExcitation(expanded, squeezed) if squeezed else nn.Identity()
        self.project = nn.Sequential(
            nn.Conv2d(expanded, outside, 1, bias=False), nn.BatchNorm2d(outside)
        )
        self.skip = stride == 1 and inside == outside

    def forward(self, x):
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.skip else y


class Mobile(nn.Module):
    """MobileNetV3 / EfficientNet shape."""

    def __init__(self, act, squeezed):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), act())
        self.blocks = nn.Sequential(
            InvertedResidual(8, 16, 8, 1, act, squeezed),
            InvertedResidual(8, 24, 12, 2, act, squeezed),
            InvertedResidual(12, 24, 12, 1, act, squeezed),
        )
        self.head = nn.Sequential(nn.Linear(12, 20), act(), nn.Dropout(0.2), nn.Linear(20, 5))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def mobilenet():
    return Mobile(nn.Hardswish, 6)


def efficientnet():
    return Mobile(nn.SiLU, 4)


def mobilenet_v2():
    return Mobile(lambda: nn.ReLU6(inplace=True), 0)


class DenseLayer(nn.Module):
    def __init__(self, inside, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, 2 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, 1, 1)

    def forward(self, features):
        x = torch.cat(features, 1)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseNet(nn.Module):
    """Each layer reads all earlier ones; a transition halves the channels."""

    def __init__(self, growth=6):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.one = nn.ModuleList([DenseLayer(8 + i * growth, growth) for i in range(3)])
        self.transition = nn.Sequential(
            nn.BatchNorm2d(26), nn.ReLU(inplace=True), nn.Conv2d(26, 12, 1), nn.AvgPool2d(2, 2)
        )
        self.two = nn.ModuleList([DenseLayer(12 + i * growth, growth) for i in range(2)])
        self.norm, self.fc = nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.one:
            features.append(layer(features))
        features = [self.transition(torch.cat(features, 1))]
        for layer in self.two:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


def densenet():
    return DenseNet()


class UNet(nn.Module):
    """Two levels; skips are concatenated, the way up is a transposed convolution or bilinear."""

    def __init__(self, norm, up):
        super().__init__()

        def double(inside, outside):
            return nn.Sequential(
                nn.Conv2d(inside, outside, 3, 1, 1), norm(outside), nn.ReLU(inplace=True),
                nn.Conv2d(outside, outside, 3, 1, 1), norm(outside), nn.ReLU(inplace=True),
            )  # fmt: skip

        self.down1, self.down2, self.middle = double(3, 8), double(8, 12), double(12, 16)
        self.up = up
        if up == "transposed":
            self.up2 = nn.ConvTranspose2d(16, 12, 2, 2)
            self.up1 = nn.ConvTranspose2d(12, 8, 2, 2)
        else:
            self.up2, self.up1 = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 8, 1)
        self.merge2, self.merge1 = double(24, 12), double(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def _up(self, layer, x):
        if self.up == "transposed":
            return layer(x)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return layer(x)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        y = self.merge2(torch.cat([self._up(self.up2, c), b], dim=1))
        return self.out(self.merge1(torch.cat([a, self._up(self.up1, y)], dim=1)))


def unet_batch_norm():
    return UNet(nn.BatchNorm2d, "transposed")


def unet_group_norm():
    return UNet(lambda c: nn.GroupNorm(4, c), "bilinear")


def shuffle(x, groups):
    """ShuffleNet's channel shuffle."""
    b, c, h, w = x.shape
    x = x.view(b, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(b, c, h, w)


class ShuffleUnit(nn.Module):
    """Half of the channels pass, half are convolved; the halves are shuffled together."""

    def __init__(self, channels, stride):
        super().__init__()
        half = channels // 2
        inside = channels if stride > 1 else half
        self.stride = stride
        if stride > 1:
            self.one = nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride, 1, groups=channels),
                nn.BatchNorm2d(channels),
                nn.Conv2d(channels, half, 1),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.two = nn.Sequential(
            nn.Conv2d(inside, half, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, groups=half),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        if self.stride == 1:
            first, second = x.chunk(2, dim=1)
            x = torch.cat((first, self.two(second)), dim=1)
        else:
            x = torch.cat((self.one(x), self.two(x)), dim=1)
        return shuffle(x, 2)


class ShuffleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.stage = nn.Sequential(ShuffleUnit(16, 2), ShuffleUnit(16, 1), ShuffleUnit(16, 1))
        self.last = nn.Conv2d(16, 20, 1)
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        return self.fc(F.relu(self.last(self.stage(self.stem(x)))).mean([2, 3]))


def shufflenet():
    return ShuffleNet()


class GroupedShuffle(nn.Module):
    """ShuffleNet v1: grouped 1x1, shuffle, depthwise, grouped 1x1."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.stem = nn.Conv2d(3, 12, 3, 1, 1)
        self.one = nn.Conv2d(12, 24, 1, groups=groups)
        self.depth = nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.two = nn.Conv2d(24, 12, 1, groups=groups)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.depth(shuffle(F.relu(self.one(x)), self.groups))
        return self.fc(F.relu(x + self.two(y)).mean((2, 3)))


def shufflenet_grouped():
    return GroupedShuffle(2)


def shufflenet_uneven():
    """8 channels a group, shuffled, don't divide by 3 groups: they can't stay equal."""
    return GroupedShuffle(3)


class NextBlock(nn.Module):
    """ConvNeXt: depthwise, norm and MLP with channels last, a learnt scale, a residual."""

    def __init__(self, channels, inner):
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """A patch stem, two stages, a norm over channels first between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.one = nn.Sequential(NextBlock(8, 20), NextBlock(8, 20))
        self.scale, self.shift = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.down, self.two = nn.Conv2d(8, 12, 2, 2), NextBlock(12, 24)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.one(self.stem(x))
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        x = self.scale[:, None, None] * x + self.shift[:, None, None]
        return self.head(self.norm(self.two(self.down(x)).mean([-2, -1])))


def convnext():
    return ConvNext()


def video():
    """Three-dimensional convolutions."""
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, 1, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)), nn.ELU(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


class TextConv(nn.Module):
    """Embedding, one-dimensional convolutions of several widths, maxima over time, PReLU."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 10)
        self.convs = nn.ModuleList([nn.Conv1d(10, 6, k) for k in (2, 3)])
        self.act, self.fc = nn.PReLU(6), nn.Linear(12, 3)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        return self.fc(torch.cat([self.act(c(x)).amax(-1) for c in self.convs], 1))


def text_conv():
    return TextConv()


class Inception(nn.Module):
    """Parallel branches of different kernels, concatenated, twice; factorised 1x7 and 7x1."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.a = self._block(8)
        self.b = self._block(20)
        self.fc = nn.Linear(20, 5)

    def _block(self, inside):
        return nn.ModuleList([
            nn.Conv2d(inside, 4, 1),
            nn.Sequential(nn.Conv2d(inside, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1)),
            nn.Sequential(
                nn.Conv2d(inside, 4, 1), nn.Conv2d(4, 4, (1, 5), 1, (0, 2)),
                nn.Conv2d(4, 4, (5, 1), 1, (2, 0)),
            ),
            nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(inside, 4, 1)),
        ])  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(torch.cat([branch(x) for branch in self.a], 1))
        x = F.relu(torch.cat([branch(x) for branch in self.b], 1))
        return self.fc(x.mean((2, 3)))


def inception():
    return Inception()


class ConvUnit(nn.Module):
    def __init__(self, inside, outside, kernel=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, 1, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outside)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class DarkBottleneck(nn.Module):
    def __init__(self, channels, skip):
        super().__init__()
        self.cv1, self.cv2 = ConvUnit(channels, channels, 3), ConvUnit(channels, channels, 3)
        self.skip = skip

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.skip else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """YOLOv8's block, as published."""

    def __init__(self, inside, outside, n=2, skip=True):
        super().__init__()
        self.c = outside // 2
        self.cv1 = ConvUnit(inside, 2 * self.c)
        self.cv2 = ConvUnit((2 + n) * self.c, outside)
        self.m = nn.ModuleList(DarkBottleneck(self.c, skip) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Sppf(nn.Module):
    """Three poolings of the same channels, concatenated."""

    def __init__(self, channels):
        super().__init__()
        self.cv1, self.cv2 = ConvUnit(channels, channels // 2), ConvUnit(channels * 2, channels)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = self.cv1(x)
        a = self.m(x)
        b = self.m(a)
        return self.cv2(torch.cat((x, a, b, self.m(b)), 1))


class Yolo(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = ConvUnit(3, 8, 3)
        self.one, self.two = C2f(8, 12, 2, True), C2f(12, 12, 1, False)
        self.spp = Sppf(12)
        self.detect = nn.ModuleList([nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 1)])

    def forward(self, x):
        a = self.one(self.stem(x))
        b = self.spp(self.two(F.max_pool2d(a, 2)))
        return [d(v) for d, v in zip(self.detect, (a, b), strict=True)]


def yolo_c2f():
    return Yolo()
