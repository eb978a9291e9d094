"""EfficientNet-Lite0 for `graphprune compile`: the module without its weights, and its input."""

from __future__ import annotations

import torch


def build() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """See docs/your-own-model.md."""
    from models.efficientnet_lite import EfficientNetLite0

    return EfficientNetLite0().eval(), (torch.zeros(2, 3, 224, 224),)
