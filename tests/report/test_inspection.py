"""`inspect --why`: expressions, sharers, and for everything frozen the operator and its line."""

import re

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.axes import atoms
from graphprune.report.inspection import explain, explained
from zoo import plain
from zoo.case import randomise
from zoo.expected import CASES

ENDS = ("a dimension of a model input", "an axis of size 1")


@pytest.fixture(scope="module")
def encoder():
    return gp.trace(randomise(plain.encoder_pre_norm()), (torch.randn(2, 5, 8),))


def test_each_part_of_a_fused_weight_is_explained(encoder):
    weight = "encoder.layers.0.self_attn.in_proj_weight"
    first, second = explain(encoder, weight)
    assert first["axis"] == "3! * kv_heads:4 * qk_dim:6"
    assert first["structures"] == [f"{weight}:0/1", f"{weight}:0/2"]
    fellows = ["encoder.layers.0.self_attn.in_proj_bias:0",
               "encoder.layers.0.self_attn.out_proj.weight:1"]  # fmt: skip
    assert first["shared"] == {
        f"{weight}:0/0": fellows[:1],
        f"{weight}:0/1": fellows,
        f"{weight}:0/2": fellows,
    }
    (cause,) = first["causes"]
    assert cause["operator"] == "aten.select"
    assert cause["module"] == "encoder.layers.0.self_attn"
    assert re.fullmatch(r"plain\.py:\d+", cause["line"])
    assert first["frozen"] == [f"a single index is taken (select at {cause['line']})"]
    assert (second["axis"], second["frozen"]) == ("hidden:24", [])
    assert "head.weight:1" in second["shared"]["stem.weight:0"]


def test_lines_for_people(encoder):
    lines = "\n".join(explained(encoder, "encoder.layers.1.linear1.weight"))
    assert "dimension 0, 32: ffn:32" in lines
    assert "shared with encoder.layers.1.linear1.bias:0, encoder.layers.1.linear2.weight:1" in lines
    assert "encoder.layers.{0..1}.linear2.weight:0" in lines  # of those that share hidden
    assert lines.endswith("leaves with layer 1 of encoder.layers")


def test_a_tied_weight_says_what_it_is():
    program = gp.trace(Tied().eval(), (torch.zeros(2, 5, dtype=torch.int64),))
    lines = explained(program, "head.weight")
    assert lines[0] == "head.weight is embed.weight, tied"
    assert "  frozen: indexed by values from outside" in lines[2]
    assert lines[3] == "    by aten.embedding in embed"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.build.__name__)
def test_everything_frozen_has_an_operator_and_a_line(case):
    program = case.trace()
    for name, dims in program.typing.parameters.items():
        for row, e in zip(explain(program, name), dims, strict=True):
            frozen = {a for a in atoms(e) if a.frozen}
            assert bool(frozen) == bool(row["causes"])
            for cause in row["causes"]:
                if cause["why"].startswith(ENDS):
                    assert cause["node"]  # the name of the input
                    continue
                assert cause["operator"], cause
                assert re.fullmatch(r"[\w.<>-]+:\d+", cause["line"] or ""), cause
