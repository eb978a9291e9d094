"""Names of outputs that say one kind of file and would be another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import EmitError


@pytest.mark.parametrize("name", ["slim.safetensors", "SLIM.SAFETENSORS", "slim.bin", "slim.pth"])
def test_a_file_of_weights_alone_is_refused(name, tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    program = gp.trace(net, (torch.zeros(2, 4),))
    with pytest.raises(EmitError, match=r"an output can't be a \.\w+ file") as refused:
        gp.compile(program, {"remove": {"ffn": 0.5}, "score": "magnitude"}, tmp_path / name)
    assert "give a directory" in str(refused.value)
    assert not list(tmp_path.iterdir())
