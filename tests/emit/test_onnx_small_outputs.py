"""A written ONNX file is compared relative to its outputs, small as they may be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.emit import onnx as emit_onnx
from graphprune.errors import VerifyError


def classifier(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2000), nn.Softmax(-1)).eval()


def test_probabilities_of_many_classes(tmp_path, monkeypatch):
    """All of them are below the difference that would pass for numbers of size one."""
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    program = gp.trace(classifier(0), (x,))
    slim = gp.apply(program, gp.select(program, remove={"ffn": 0.5}))
    slim.save(tmp_path / "right.onnx", "onnx")
    other = gp.trace(classifier(1), (x,)).exported
    convert = emit_onnx.convert
    monkeypatch.setattr(emit_onnx, "convert", lambda exported, names: convert(other, names))
    with pytest.raises(VerifyError, match="gives other outputs"):
        slim.save(tmp_path / "wrong.onnx", "onnx")
