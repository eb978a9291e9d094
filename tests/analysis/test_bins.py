"""Bins of a distribution aren't channels, though a convolution reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import graphprune as gp
from graphprune.analysis.program import BaseProgram
from graphprune.errors import PlanError

BINS = 16


class Head(nn.Module):
    """A detector's end as YOLOv8 has it: each edge of a box is the mean of a distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.box = nn.Conv2d(24, 4 * BINS, 1)
        self.mean = nn.Conv2d(BINS, 1, 1, bias=False)
        distances = torch.arange(float(BINS)).view(1, BINS, 1, 1)
        self.mean.weight = nn.Parameter(distances, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.box(torch.relu(self.stem(x)))
        count, _, height, width = x.shape
        x = x.view(count, 4, BINS, height * width).transpose(2, 1).softmax(1)
        return self.mean(x).view(count, 4, height * width)


def roles(program: BaseProgram) -> set[tuple[str, int]]:
    return {(s.role, s.size) for s in program.structures if s.prunable}


def test_channels_leave_them_whole() -> None:
    torch.manual_seed(0)
    program = gp.trace(Head().eval(), (torch.randn(2, 3, 6, 6),))
    assert roles(program) == {("channels", 24), ("bins", BINS)}
    plan = gp.select(program, remove={"channels": 0.5})
    slim = gp.apply(program, plan)
    assert gp.verify(program, plan, slim).passed
    kept = slim.module.state_dict()
    assert kept["stem.weight"].shape[0] == 12
    torch.testing.assert_close(kept["mean.weight"].flatten(), torch.arange(float(BINS)))


def test_they_go_where_they_are_named() -> None:
    """What is left of the distribution is one, of the distances that stay."""
    torch.manual_seed(0)
    program = gp.trace(Head().eval(), (torch.randn(2, 3, 6, 6),))
    plan = gp.select(program, remove={"bins": 0.25})
    slim = gp.apply(program, plan)
    assert gp.verify(program, plan, slim).passed
    assert slim.module.get_parameter("mean.weight").numel() == 12


def test_graphs_of_onnx(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,3,4,4] x) => (float[1,1,4,4] y) {
            h = Conv(x, a)
            r = Relu(h)
            b = Conv(r, c)
            s = Softmax <axis = 1> (b)
            y = Conv(s, d)
        }
        """
    )
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(24, 3, 1, 1)), "c": rng.normal(size=(BINS, 24, 1, 1)),
               "d": np.arange(BINS).reshape(1, BINS, 1, 1)}  # fmt: skip
    for name, value in weights.items():
        graph.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.save(graph, tmp_path / "head.onnx")
    assert roles(gp.load(tmp_path / "head.onnx")) == {("channels", 24), ("bins", BINS)}


def test_a_softmax_between_linear_layers_is_of_units_as_before() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).softmax(-1))

    program = gp.trace(Mixed().eval(), (torch.randn(2, 6),))
    assert roles(program) == {("latent", 10)}
    with pytest.raises(PlanError, match="bins"):
        gp.select(program, remove={"bins": 0.5})
