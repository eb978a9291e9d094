"""``heads`` means one thing: a key-value head with its query heads, or simply a head."""

from __future__ import annotations

from typing import Any

import pytest

import graphprune as gp
from graphprune.errors import PlanError, RecipeError
from graphprune.ir.torch.program import Program
from graphprune.passes.selection.select import select
from graphprune.recipe.recipe import Recipe

# Six query heads on two key-value heads; six heads, each with its own; six on one.
MODELS = {"grouped": (2, 1), "plain": (6, 3), "one": (1, 1)}


@pytest.fixture(params=MODELS, scope="module")
def model(request, make_llama) -> tuple[Program, int, int, int]:
    """A model, the query heads of a unit, and units before and after half of them go."""
    if request.param == "one":
        return make_llama(kv=1, layers=1), 1, 6, 3
    kv, after = MODELS[request.param]
    return make_llama(kv=kv, layers=1), 6 // kv, kv, after


def query_heads(program: Program, plan: gp.Plan) -> int:
    """Counted in the slim model: rows of the query projection, in heads of eight."""
    return gp.apply(program, plan).shapes["model.layers.0.self_attn.q_proj.weight"][0] // 8


def test_every_way_to_say_it(model) -> None:
    program, queries, units, after = model
    ways: list[dict[str, Any]] = [
        {"remove": {"heads": 0.5}},
        {"remove": {"model.layers.*/heads": 0.5}},
        {"remove": {"*": 0.5}, "include": ["*/heads"]},
        {"remove": {"own": 0.5}, "names": {"*.q_proj.weight/heads": "own"}},
        {"shape": {"heads": after}},
    ]  # fmt: skip
    for way in ways:
        assert query_heads(program, select(program, score="random", **way)) == after * queries, way
    assert query_heads(program, select(program, shape={"heads": units})) == 6
    kept = gp.compile(program, {"remove": {"heads": 0.5}, "score": "random"}, dry_run=True).kept
    assert list(kept.values()) == [(after, units)]


def test_whole_heads_stay_with_what_is_excluded(model) -> None:
    program, *_ = model
    with pytest.raises(PlanError, match="leave no structure"):
        select(program, remove={"heads": 0.5}, exclude=["model.layers.0.*/heads"])


def test_a_number_of_query_heads_is_told_what_units_are(gqa: Program) -> None:
    with pytest.raises(PlanError, match="a unit of heads is a key-value head with its 3") as told:
        select(gqa, shape={"heads": 6})
    assert "for 6 query heads ask for heads=2" in str(told.value)
    with pytest.raises(PlanError, match="query_heads says how many stay of each"):
        select(gqa, shape={"heads": 4})
    plan = select(gqa, shape={"heads": 2, "query_heads": 2})
    assert query_heads(gqa, plan) == 4


SAME = [
    {"remove": {"heads": 0.5, "kv_heads": 0.5}},
    {"shape": {"heads": 1, "kv_heads": 1}},
    {"remove": {"ffn": 0.5}, "align": {"heads": 8, "kv_heads": 8}},
]


@pytest.mark.parametrize("options", SAME)
def test_two_names_of_one_role(gqa: Program, options: dict) -> None:
    with pytest.raises(RecipeError, match="the same role"):
        Recipe.parse(options)
    with pytest.raises(PlanError, match="the same role"):
        select(gqa, **options)
