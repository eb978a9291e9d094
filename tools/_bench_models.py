"""The ONNX files that tools/bench measures, made on the spot."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn


def minilm(file: Path, *, dynamo: bool = True) -> dict[str, torch.Tensor]:
    """A BERT sentence encoder of six layers; a batch of 8 with 128 tokens, both open."""
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    class Encoder(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            found = self.model(input_ids=input_ids, attention_mask=attention_mask)
            hidden: torch.Tensor = found.last_hidden_state
            return hidden

    tool = Path(__file__).with_name("models")
    done = subprocess.run(
        [sys.executable, str(tool), "--path", "minilm"], check=True, stdout=subprocess.PIPE
    )
    model = AutoModel.from_pretrained(done.stdout.decode().strip(), trust_remote_code=False)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(0, model.config.vocab_size, (8, 128), generator=generator),
        "attention_mask": torch.ones(8, 128, dtype=torch.int64),
    }
    _export(Encoder(model.eval()), inputs, file, {0: "batch", 1: "length"}, dynamo=dynamo)
    return inputs


class Bottleneck(nn.Module):
    """Three convolutions and a way round them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        """The second convolution has the stride, and the result four times the width."""
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *_convolution(inputs, width, 1), nn.ReLU(),
            *_convolution(width, width, 3, stride), nn.ReLU(),
            *_convolution(width, outputs, 1),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.around = nn.Sequential(*(() if same else _convolution(inputs, outputs, 1, stride)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[batch, channels, height, width]``."""
        return torch.relu(self.body(x) + self.around(x))


def resnet50(file: Path) -> dict[str, torch.Tensor]:
    """`resnet50_module`, and one image of 224 x 224."""
    images = {"image": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
    _export(resnet50_module(), images, file, {})
    return images


def resnet50_module() -> nn.Module:
    """ResNet-50 (He et al. 2016, version 1.5) with random weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for depth, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for number in range(depth):
            layers.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    model = nn.Sequential(*layers).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # equal ones would become one constant
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    padding = size // 2
    return (
        nn.Conv2d(inputs, outputs, size, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _export(
    module: nn.Module,
    inputs: dict[str, torch.Tensor],
    file: Path,
    dynamic: dict[int, str],
    *,
    dynamo: bool = True,
) -> None:
    if dynamo:
        shapes = [{i: torch.export.Dim(n) for i, n in dynamic.items()} for _ in inputs]
        options: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
        options["dynamic_shapes"] = shapes if dynamic else None
    else:
        options = {"dynamo": False, "opset_version": 17}
        options["dynamic_axes"] = dict.fromkeys((*inputs, "result"), dynamic) if dynamic else None
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=["result"],
            **options,
        )
    logging.disable(logging.NOTSET)
