"""A PyTorch state dict, for a model whose definition is in tests/models."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def convert(source: Path, target: Path) -> None:
    """Rewrite the one ``.pth`` file as ``model.safetensors``."""
    (checkpoint,) = source.glob("*.pth")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, target / "model.safetensors")
