"""Selectors: naming, freezing and pruning chosen structures, by parameter, dimension and role."""

from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import PlanError, RecipeError
from graphprune.pipeline.compiler import compile
from graphprune.plan.selector import Selector, named
from graphprune.recipe.recipe import Recipe
from regressions.hand import verified
from zoo import plain
from zoo.case import randomise

FFN = "encoder.layers.{}.linear1.weight:0"


class Mlp(nn.Module):
    """Three inner widths of 12, two of them behind activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 12)
        self.third, self.last = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.last(torch.relu(self.third(x)))


@pytest.fixture(scope="module")
def mlp():
    return gp.trace(randomise(Mlp()), (torch.randn(4, 6),))


@pytest.fixture(scope="module")
def encoder():
    return gp.trace(randomise(plain.encoder_pre_norm()), (torch.randn(2, 5, 8),))


def left(plan):
    return {
        name: len(units[0]) if isinstance(units[0], tuple) else len(units)
        for name, units in plan.kept_units.items()
    }


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.*", ("a.*", None, "", None)),
        ("a.*:1", ("a.*", 1, "", None)),
        ("a.*:-1", ("a.*", -1, "", None)),
        ("a:0/1/0", ("a", 0, "/1/0", None)),
        ("a.[4-9].*/ffn", ("a.[4-9].*", None, "", "ffn")),
        ("a:0/1/qk_dim", ("a", 0, "/1", "qk_dim")),
    ],
)
def test_what_a_selector_says(text, parsed):
    s = Selector.parse(text)
    assert (s.glob, s.dim, s.path, s.role) == parsed


@pytest.mark.parametrize("text", ["", ":0", "a:", "a:x", "a/", "a/b/c", "/ffn", "a:0/1/ffn/2"])
def test_what_is_no_selector(text):
    with pytest.raises(ValueError, match="is not a glob"):
        Selector.parse(text)


def test_a_dimension_is_frozen_and_the_other_is_not(mlp):
    plan = gp.select(mlp, remove={"ffn": 0.5}, exclude=["second.weight:0"])
    assert left(plan) == {"first.weight:0": 6, "third.weight:0": 6}
    plan = gp.select(mlp, remove={"ffn": 0.5}, exclude=["second.weight:-1"])
    assert left(plan) == {"second.weight:0": 6, "third.weight:0": 6}
    plan = gp.select(mlp, remove={"ffn": 0.5}, exclude=["second.weight"])
    assert left(plan) == {"third.weight:0": 6}
    plan = gp.select(mlp, remove={"ffn": 0.5}, include=["second.*:0"])
    assert left(plan) == {"second.weight:0": 6}


def test_a_frozen_dimension_keeps_its_layer(encoder):
    options: dict[str, Any] = {"remove": {"layers": 0.5}, "score": "random"}
    for seed in range(4):
        plan = gp.select(encoder, exclude=[FFN.format(0)], seed=seed, **options)
        assert plan.kept_units == {"encoder.layers": (0,)}
    with pytest.raises(PlanError, match="'layers' can be pruned"):
        gp.select(encoder, include=[FFN.format(0)], **options)
    plan = gp.select(encoder, exclude=["encoder.layers.0.*/ffn"], remove={"*": 0.5})
    assert FFN.format(0) not in plan.kept_units
    assert FFN.format(1) in plan.kept_units
    assert left(plan)["encoder.layers"] == 1


def test_a_fraction_for_chosen_layers_only(encoder):
    size = encoder.by_name[FFN.format(0)].size
    plan = gp.select(encoder, remove={"encoder.layers.1.*/ffn": 0.25})
    assert left(plan) == {FFN.format(1): size * 3 // 4}
    plan = gp.select(encoder, remove={"ffn": 0.5, "encoder.layers.1.*/ffn": 0.25})
    assert left(plan) == {FFN.format(0): size // 2, FFN.format(1): size * 3 // 4}
    verified(encoder, plan)
    plan = gp.select(encoder, remove={"*": 0.5, "encoder.layers.[01].*/ffn": 0})
    assert not {FFN.format(0), FFN.format(1)} & plan.kept_units.keys()
    assert "encoder.layers" in plan.kept_units
    plan = gp.select(encoder, remove={"encoder.layers.1.*/layers": 0.9}, score="random")
    assert plan.kept_units == {"encoder.layers": (0,)}


def test_part_of_a_dimension(encoder):
    weight = "encoder.layers.0.self_attn.out_proj.weight:1"
    heads, dims = (
        next(s for s in encoder.structures if s.role == role and s.scope == "encoder.layers.0")
        for role in ("kv_heads", "qk_dim")
    )
    both = gp.select(encoder, remove={weight: 0.5})
    assert both.kept_units.keys() == {heads.name, dims.name}
    one = gp.select(encoder, remove={f"{weight}/qk_dim": 0.5})
    assert one.kept_units.keys() == {dims.name}
    assert "/" in dims.name
    assert gp.select(encoder, remove={dims.name: 0.5}).kept_units.keys() == {dims.name}


def test_a_role_of_ones_own(mlp):
    names = {"second.weight:0": "middle", "first.*/ffn": "middle"}
    plan = gp.select(mlp, remove={"middle": 0.5}, names=names)
    assert left(plan) == {"first.weight:0": 6, "second.weight:0": 6}
    verified(mlp, plan)  # which knows nothing of names
    plan = gp.select(mlp, remove={"ffn": 0.5}, names=names)
    assert left(plan) == {"third.weight:0": 6}
    plan = gp.select(mlp, remove={"*": 0.5, "middle": 0.25}, names=names)
    assert left(plan) == {"first.weight:0": 9, "second.weight:0": 9, "third.weight:0": 6}
    plan = gp.select(mlp, shape={"middle": 5}, names=names)
    assert left(plan) == {"first.weight:0": 5, "second.weight:0": 5}
    plan = gp.select(mlp, remove={"middle": 0.4}, names=names, align={"middle": 4})
    assert left(plan) == {"first.weight:0": 8, "second.weight:0": 8}
    plan = gp.select(mlp, target={"params": 215}, names=names)
    assert len(plan.kept_units) == 3
    assert {s.role for s in mlp.structures if s.prunable} == {"ffn"}
    assert named(mlp, names).fingerprint == mlp.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["fist.*"]}, "no parameter matches 'fist.*'"),
        ({"exclude": ["first.weight:2"]}, "has a dimension 2"),
        ({"exclude": ["first.*/channels"]}, "no role 'channels'"),
        ({"exclude": ["first.weight:"]}, "is not a glob of parameter names"),
        ({"include": ["last.bias"]}, "exclude and include leave"),
        ({"names": {"last.weight:0": "mine"}}, "means no structure that can be pruned"),
        ({"names": {"first.weight:0": "a b"}}, "not a word"),
        ({"remove": {"first.*": 0.5}}, "say which: first.*/ffn"),
        ({"remove": {"last.weight:0": 0.5}}, "means nothing that can be pruned"),
        ({"remove": {"first.weight:0": 0.5, "*.weight/ffn": 0.2}}, "both mean first.weight:0"),
        ({"remove": {"mine": 0.5}}, "no role 'mine'"),
    ],
)
def test_mistakes_are_told(mlp, options, message):
    with pytest.raises(PlanError) as caught:
        gp.select(mlp, **({"remove": {"ffn": 0.5}} | options))
    assert message in str(caught.value)


def test_the_recipe_says_the_same(mlp):
    recipe = Recipe.parse(
        {
            "names": {"second.weight:0": "middle"},
            "remove": {"middle": 0.5, "third.*:0/ffn": "1/4"},
            "align": {"middle": 2},
            "exclude": "first.*:0",
        }
    )
    report = compile(mlp, recipe, dry_run=True)
    assert report.kept == {"middle": (6, 12), "ffn": (12 + 9, 24)}
    assert Recipe.parse(recipe.model_dump(exclude_unset=True)) == recipe


def test_names_and_selectors_over_several_rounds(mlp):
    data = {"names": {"second.weight:0": "middle"}, "remove": {"middle": 0.5, "first.*:0": 0.75}}
    report = compile(mlp, data | {"rounds": 3}, dry_run=True)
    assert report.kept == {"middle": (6, 12), "ffn": (3 + 12, 24)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"remove": {"midle": 0.5}, "names": {"a.*": "middle"}}, "did you mean 'middle'?"),
        ({"remove": {"a.*/fnn": 0.5}}, "did you mean 'ffn'?"),
        ({"remove": {"ffn": 0.5}, "exclude": ["a.*/fnn"]}, "did you mean 'ffn'?"),
        ({"remove": {"ffn": 0.5}, "exclude": ["a:x"]}, "is not a glob of parameter names"),
        ({"remove": {"ffn": 0.5}, "names": {"a.*": "two words"}}, "'two words' is not a word"),
    ],
)
def test_recipes_that_are_wrong(data, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data)
    assert message in str(caught.value)
