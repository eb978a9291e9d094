"""Masks for the format `strip_u8`: equal counts in every 256 columns of a row."""

import pytest
import torch

from graphprune.errors import RecipeError
from graphprune.kernels.formats.strip import Strip
from graphprune.passes.masks.alps import ALPS
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.recipe.recipe import Recipe
from graphprune.solvers import NM, Moments, strips

SOLVERS = [Magnitude(), Wanda(), RIA(), SparseGPT(), ALPS(), DSnoT()]


def layer(columns, rows=24):
    torch.manual_seed(columns)
    moment = Moments(columns)
    mixed = torch.randn(900, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / 20)
    moment.add(mixed, "layer")
    return torch.randn(rows, columns), moment


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("columns", [256, 576])
def test_every_strip_keeps_as_many(solver, columns):
    weight, moment = layer(columns)
    solved = solver.solve(weight, moment, strips(0.625))
    for begin in range(0, columns, 256):
        strip = solved.mask[:, begin : begin + 256]
        assert strip.sum(1).tolist() == [round(0.375 * strip.shape[1])] * len(weight)
    packed = Strip.pack(solved.weight, slots=96)
    assert torch.equal(packed.unpack(), solved.weight)
    assert not solved.notes


def test_the_best_of_each_strip_stay():
    weight, moment = layer(300)
    mask = Magnitude().solve(weight, moment, strips(0.5)).mask
    for begin, end, kept in ((0, 256, 128), (256, 300, 22)):
        size = weight[:, begin:end].abs()
        least = torch.where(mask[:, begin:end], size, torch.inf).amin(1)
        most = torch.where(mask[:, begin:end], 0, size).amax(1)
        assert (least >= most).all()
        assert (mask[:, begin:end].sum(1) == kept).all()


def test_zeros_stay_zero_in_a_shorter_strip():
    weight, moment = layer(300)
    weight[:, 256:280] = 0
    solved = SparseGPT().solve(weight, moment, NM(128, 256, preserve=True, shorter=True))
    assert not solved.mask[:, 256:280].any()
    assert (solved.mask[:, 280:].sum(1) == 20).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
def test_other_sparsities_are_refused(sparsity):
    with pytest.raises(RecipeError, match="balanced strips"):
        strips(sparsity)


def test_the_next_sparsities_are_named():
    with pytest.raises(RecipeError) as error:
        strips(0.6)
    assert "56.25% or 62.50%" in error.value.hint


def test_a_recipe_asks_for_strips():
    recipe = Recipe.parse(
        {"sparsify": {"method": "wanda", "sparsity": "62.5%", "balance": "strip"}}
    )
    assert recipe.sparsify.wanted() == NM(96, 256, shorter=True)


@pytest.mark.parametrize(
    "more",
    [{"sparsity": 0.6}, {"pattern": "2:4"}, {"sparsity": 0.5, "budget": "owl"}],
    ids=["sparsity", "pattern", "budget"],
)
def test_recipes_that_contradict_strips(more):
    with pytest.raises(RecipeError, match="strip"):
        Recipe.parse({"sparsify": {"method": "wanda", "balance": "strip", **more}})
