"""What can't be is said before weights are checked and data is read."""

from __future__ import annotations

import pytest

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.pipeline import compiler, run

RECIPES = {
    "role": ({"remove": {"experts": 0.5}}, "no role 'experts'"),
    "role among others": ({"remove": {"ffn": 0.5, "channels": 0.5}}, "no role 'channels'"),
    "role by score": (
        {"remove": {"ffn": 0.5, "experts": 0.5}, "uniform": False}, "no role 'experts'"
    ),
    "shape": ({"shape": {"experts": 2}}, "no role 'experts'"),
    "size": ({"shape": {"ffn": 400}}, "not reachable"),
    "heads": ({"shape": {"heads": 5}}, "not reachable"),
    "selector": ({"remove": {"model.layers.*/experts": 0.5}}, "no role 'experts'"),
    "pattern": ({"remove": {"model.layer.*/ffn": 0.5}}, "no parameter matches"),
    "exclude": ({"remove": {"ffn": 0.5}, "exclude": ["nothing.*"]}, "no parameter matches"),
    "include": ({"remove": {"ffn": 0.5}, "include": ["nothing.*"]}, "no parameter matches"),
    "exclude role": ({"target": {"params": 0.9}, "exclude": ["*/experts"]}, "no role 'experts'"),
    "dimension": ({"remove": {"ffn": 0.5}, "exclude": ["lm_head.weight:7"]}, "dimension 7"),
    "all excluded": ({"remove": {"ffn": 0.5}, "exclude": ["*/ffn"]}, "leave no structure"),
    "names": ({"remove": {"own": 0.5}, "names": {"nothing.*/ffn": "own"}}, "no parameter matches"),
    "too many layers": (
        {"remove": {"layers": 0.6}, "exclude": ["model.layers.[01].*"]},
        "only 1 may|judged by the score",
    ),
    "floor": ({"remove": {"ffn": 0.5}, "minimum": 80}, "can be smaller"),
    "budget": ({"target": {"params": 0.01}}, "not reachable"),
    "masks": (
        {"sparsify": {"method": "wanda", "sparsity": 0.5, "include": ["nothing.*"]}}, "nothing"
    ),
}  # fmt: skip


@pytest.fixture
def unread(monkeypatch):
    """Checking weights and reading data fail."""

    def touched(*args, **kwargs):
        raise AssertionError("weights or data were read")

    monkeypatch.setattr(compiler, "check_weights", touched)
    monkeypatch.setattr(run, "calibration_samples", touched)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("score", ["minitron", "taylor", "obs"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_mistake_is_told_at_once(gqa, tmp_path, name, score):
    recipe, message = RECIPES[name]
    if "sparsify" not in recipe:
        recipe = {**recipe, "score": score}
    with pytest.raises(PlanError, match=message):
        gp.compile(gqa, recipe, tmp_path / "slim.pt2")


@pytest.mark.usefixtures("unread")
def test_a_plan_of_another_model(gqa, make_llama, tmp_path):
    other = make_llama(ffn=40)
    gp.select(other, remove={"ffn": 0.5}).save(tmp_path / "plan.json")
    recipe = {"plan": str(tmp_path / "plan.json"), "repair": "reconstruct"}
    with pytest.raises(PlanError):
        gp.compile(gqa, recipe, tmp_path / "slim.pt2")


def test_select_itself_tells_before_it_scores(gqa):
    class Never:
        def score(self, program, structures, inputs):
            raise AssertionError("scored")

    with pytest.raises(PlanError, match="no role"):
        gp.select(gqa, remove={"ffn": 0.5, "experts": 0.5}, score=Never(), uniform=False)
