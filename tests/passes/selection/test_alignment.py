"""Alignment by number and by name, on the command line, in recipes and in Python."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import PlanError, RecipeError
from graphprune.recipe.recipe import Recipe


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 1000), nn.Linear(1000, 4)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Attention(nn.Module):
    """Six heads of 24, of which a multiple of 64 would be eight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 144) for _ in range(3))
        self.o = nn.Linear(144, 16)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (6, 24)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("align", "left"),
    [("gpu", 704), ("ort", 704), ("gguf", 768), (64, 704), ({"ffn": "gguf"}, 768),
     ({"*": "gpu", "ffn": 100}, 700)],
)  # fmt: skip
def test_names_are_numbers(align, left) -> None:
    program = gp.trace(Wide().eval(), (torch.randn(2, 4),))
    plan = gp.select(program, remove={"ffn": 0.3}, align=align, score="random")
    assert gp.apply(program, plan).shapes["up.weight"][0] == left
    recipe = {"remove": {"ffn": 0.3}, "align": align, "score": "random"}
    report = gp.compile(program, recipe, dry_run=True)
    assert report.kept == {"ffn": (left, 1000)}


def test_heads_are_never_aligned_unless_they_are_named() -> None:
    program = gp.trace(Attention().eval(), (torch.randn(2, 5, 16),))
    for align in ("gpu", 64, 256):
        plan = gp.select(program, remove={"heads": 1 / 3}, align=align, score="random")
        assert gp.apply(program, plan).shapes["o.weight"] == (16, 4 * 24)
    plan = gp.select(program, remove={"heads": 1 / 3}, align={"heads": "ort"}, score="random")
    assert gp.apply(program, plan).shapes["o.weight"] == (16, 4 * 24)  # 96 is a multiple of 16
    plan = gp.select(program, remove={"heads": 1 / 6}, align={"heads": "ort"}, score="random")
    assert gp.apply(program, plan).shapes["o.weight"][1] in (4 * 24, 6 * 24)  # and 120 is none


@pytest.mark.parametrize(
    ("words", "align"),
    [
        (["64"], {"*": 64}),
        (["gpu"], {"*": 64}),
        (["ffn=gguf"], {"ffn": 256}),
        (["ffn=gguf,hidden=ort"], {"ffn": 256, "hidden": 16}),
        (["ort", "ffn=96"], {"*": 16, "ffn": 96}),
    ],
)
def test_words_of_the_command_line(words, align) -> None:
    assert Recipe.from_flags(None, {"remove": ["ffn=0.5"], "align": words}).align == align


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gpuu"], "unknown alignment 'gpuu'; did you mean 'gpu'?"),
        (["ffn=tpu"], "unknown alignment 'tpu'"),
        (["fnn=gpu"], "unknown role 'fnn'; did you mean 'ffn'?"),
        (["0"], "at least 1"),
        (["2.5"], "at least 1"),
        (["gpu", "64"], "given twice"),
        (["ffn="], "no alignment"),
    ],
)
def test_mistakes(words, told) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_flags(None, {"remove": ["ffn=0.5"], "align": words})
    assert told in str(caught.value)


def test_mistakes_in_python() -> None:
    program = gp.trace(Wide().eval(), (torch.randn(2, 4),))
    with pytest.raises(PlanError, match="did you mean 'gguf'"):
        gp.select(program, remove={"ffn": 0.5}, align={"ffn": "ggml"})
