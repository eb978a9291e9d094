"""Complaints about budgets and control (structured.md, section 3 E), on plain modules."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.pipeline.steps.rounds import composed
from graphprune.plan.kept import rows_of
from graphprune.rewrite.retrace import retrace
from regressions.hand import kept, verified
from zoo import plain, sharing
from zoo.case import randomise


def mlp(a=40, b=20):
    module = nn.Sequential(nn.Linear(6, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 3))
    return gp.trace(randomise(module), (torch.randn(4, 6),))


def test_35_a_budget_is_in_parameters_and_is_met():
    program = mlp(400, 200)
    total = program.costs.total().params
    assert total == 6 * 400 + 400 + 400 * 200 + 200 + 200 * 3 + 3
    for fraction in (0.9, 0.5, 0.2):
        plan = gp.select(program, target={"params": fraction}, score="random", uniform=False)
        left = verified(program, plan).cost.params
        assert (fraction - 0.005) * total <= left <= fraction * total


def test_36_a_smaller_budget_never_gives_a_larger_model():
    program = gp.trace(randomise(sharing.vision_transformer()), (torch.randn(2, 3, 8, 8),))
    total = program.costs.total().params
    sizes = []
    for fraction in (0.9, 0.7, 0.5, 0.3, 0.15):
        roles = ["ffn", "kv_heads", "hidden"]
        plan = gp.select(program, target={"params": fraction}, uniform=False, roles=roles)
        sizes.append(gp.apply(program, plan).cost.params)
        assert sizes[-1] <= fraction * total
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("uniform", [True, False])
def test_37_a_floor_holds_in_global_ranking_too(uniform):
    program = mlp()
    plan = gp.select(program, remove={"ffn": 0.9}, minimum=0.4, uniform=uniform)
    counts = {name: len(units) for name, units in plan.kept_units.items()}
    assert counts == {"0.weight:0": 16, "2.weight:0": 8}


def test_38_nothing_to_remove_is_an_error_and_says_why():
    program = mlp()
    with pytest.raises(PlanError, match="no role 'channels'"):
        gp.select(program, remove={"channels": 0.5})
    frozen = gp.trace(nn.Linear(6, 3).eval(), (torch.randn(4, 6),))
    with pytest.raises(PlanError) as caught:
        gp.select(frozen, remove={"ffn": 0.5})
    assert "model input" in str(caught.value)
    with pytest.raises(PlanError, match="smaller"):
        gp.select(program, remove={"ffn": 0.5}, minimum=40)


def test_39_plans_of_several_rounds_are_in_the_numbers_of_the_original(tmp_path):
    program = mlp()
    slim = gp.apply(program, gp.select(program, remove={"ffn": 0.5}, score="random", seed=1))
    current = retrace(slim)
    later = gp.select(current, remove={"ffn": 0.5}, score="random", seed=2)
    plan = composed(slim, current, later)
    first = kept(program, slim.plan, "0.weight")[0]
    (then,) = rows_of(later.kept_units["0.weight:0"])
    assert kept(program, plan, "0.weight")[0] == [first[i] for i in then]
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["structures"]["0.weight:0"]["size"] == 40
    again = gp.Plan.load(tmp_path / "plan.json")
    assert again == plan
    sibling = mlp()  # the same shapes, other weights
    verified(sibling, again)


def test_40_41_globs_choose_what_is_pruned():
    program = gp.trace(randomise(plain.encoder_pre_norm()), (torch.randn(2, 5, 8),))
    options: dict[str, Any] = {"remove": {"ffn": 0.5}, "score": "random"}
    only = gp.select(program, include=["encoder.layers.1.*"], **options)
    assert list(only.kept_units) == ["encoder.layers.1.linear1.weight:0"]
    without = gp.select(program, exclude=["*.layers.1.linear?.weight"], **options)
    assert list(without.kept_units) == ["encoder.layers.0.linear1.weight:0"]
    verified(program, only)
