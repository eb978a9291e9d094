"""EfficientNet-Lite0, with the parameter names of the published checkpoint.

Depthwise and pointwise convolutions, batch normalisation, ReLU6, residual adds and TensorFlow's
asymmetric "same" padding: what a compiler meets in mobile vision models.
Source: https://arxiv.org/abs/1905.11946, in the variant without squeeze-and-excitation.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class Stage(NamedTuple):
    """A run of blocks; only the first one has the stride and changes the width."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow does: output size ``ceil(input / stride)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[batch, in, height, width]`` to ``[batch, out, height', width']``."""
        padding: list[int] = []
        # From the last dimension to the first, as F.pad wants them.
        sides = zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True)
        for size, kernel, stride in sides:
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(input, padding))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Expand by a pointwise, filter by a depthwise, project by a pointwise convolution."""

    def __init__(self, stage: Stage, channels: int, stride: int) -> None:
        """Make one block of ``stage`` that reads ``channels`` channels."""
        super().__init__()
        width = channels * stage.expansion
        self.residual = stride == 1 and channels == stage.channels
        if stage.expansion > 1:
            self._expand_conv = SameConv2d(channels, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv2d(
            width, width, stage.kernel, stride, groups=width, bias=False
        )
        self._bn1 = _norm(width)
        self._project_conv = SameConv2d(width, stage.channels, 1, bias=False)
        self._bn2 = _norm(stage.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to the stage's channels."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The classifier: ``[batch, 3, height, width]`` to ``[batch, classes]`` logits.

    Pixels are scaled as ``(x - 127) / 128``; the checkpoint was trained at 224 by 224.
    """

    def __init__(self, classes: int = 1000) -> None:
        """Make the network with random weights."""
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, 3, 2, bias=False)
        self._bn0 = _norm(STEM_CHANNELS)
        self._blocks = nn.ModuleList()
        widths = [STEM_CHANNELS, *(stage.channels for stage in STAGES)]
        for stage, (before, after) in zip(STAGES, pairwise(widths), strict=True):
            self._blocks.append(InvertedResidual(stage, before, stage.stride))
            self._blocks.extend(InvertedResidual(stage, after, 1) for _ in range(stage.blocks - 1))
        self._conv_head = SameConv2d(widths[-1], HEAD_CHANNELS, 1, bias=False)
        self._bn1 = _norm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def pretrained(folder: Path) -> EfficientNetLite0:
    """Load the ImageNet weights from what ``model_path("efflite0")`` returns."""
    model = EfficientNetLite0()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


def preprocess(pixels: Tensor) -> Tensor:
    """Scale ``uint8`` RGB pixels of any shape to what the network was trained on."""
    return (pixels.to(torch.float32) - 127.0) / 128.0
