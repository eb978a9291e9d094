"""What LLM-Pruner's command line can ask for, as recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graphprune as gp
from graphprune.pipeline.compiler import choose
from graphprune.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def program(dense: Path) -> Any:
    return gp.load(str(dense))


@pytest.fixture
def plan(program: Any, text: Path) -> Any:
    def of(**recipe: Any) -> gp.Plan:
        calibration = {"text": str(text), "windows": 4, "length": 16}
        return choose(program, Recipe.parse({"calibration": calibration, **recipe}))

    return of


def sizes(program: Any, plan: gp.Plan, role: str) -> list[int]:
    found = [s for s in program.structures if s.role == role]
    assert found
    return [len(plan.kept_units.get(s.name, range(s.size))) for s in found]


@pytest.mark.parametrize("score", ["element1", "element2", "element-mix", "vector"])
def test_block_wise_with_protected_layers(program: Any, plan: Any, score: str) -> None:
    found = plan(
        score=score,
        remove={"ffn": 0.25, "kv_heads": "1/3"},
        exclude=["model.layers.0.*"],
        aggregate="sum",
    )
    assert sizes(program, found, "ffn") == [64, 48, 48]
    assert sizes(program, found, "kv_heads") == [3, 2, 2]
    assert sizes(program, found, "hidden") == [48]


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max", "prod", "last"])
def test_group_aggregation(program: Any, plan: Any, aggregate: str) -> None:
    """`last` judges an ffn by its last projection alone."""
    found = plan(score="element1", remove={"ffn": 0.5}, aggregate=aggregate)
    assert sizes(program, found, "ffn") == [32, 32, 32]
    summed = plan(score="element1", remove={"ffn": 0.5}, aggregate="sum")
    assert (found == summed) == (aggregate in ("sum", "mean"))


def test_channel_wise(program: Any, plan: Any) -> None:
    found = plan(score="element1", remove={"hidden": 0.25})
    assert sizes(program, found, "hidden") == [36]
    assert sizes(program, found, "ffn") == [64, 64, 64]


def test_layer_wise(program: Any, plan: Any) -> None:
    """The original keeps the first layers and has no score; here the last can be chosen, too."""
    found = plan(score="random", shape={"layers": 2}, exclude=["model.layers.[0-1].*"])
    assert found.kept_units == {"model.layers": (0, 1)}
    scored = plan(score="element1", shape={"layers": 2})
    assert len(scored.kept_units["model.layers"]) == 2


def test_iterative(program: Any, plan: Any) -> None:
    once = plan(score="element1", remove={"ffn": 0.5, "kv_heads": "1/3"})
    twice = plan(score="element1", remove={"ffn": 0.5, "kv_heads": "1/3"}, rounds=2)
    for role in ("ffn", "kv_heads"):
        assert sizes(program, twice, role) == sizes(program, once, role)
    assert twice.kept_units != once.kept_units  # gradients are taken anew of what is left


def test_over_all_layers(program: Any, plan: Any) -> None:
    found = plan(score="element1", remove={"ffn": 0.25}, uniform=False)
    assert sum(sizes(program, found, "ffn")) == 144


@pytest.mark.parametrize("score", ["minitron", "flap", "wanda-sp"])
def test_scores_of_activations(program: Any, plan: Any, score: str) -> None:
    found = plan(score=score, remove={"ffn": 0.25, "kv_heads": "1/3"})
    assert sizes(program, found, "ffn") == [48, 48, 48]
    assert sizes(program, found, "kv_heads") == [2, 2, 2]


def test_a_plain_name_on_the_command_line(run: Any, dense: Path, text: Path) -> None:
    result = run("compile", dense, "--remove", "ffn=0.25", "--score", "element-mix",
                 "--text", text, "--dry-run")  # fmt: skip
    assert result.code == 0, result.err
    assert "scored by element-mix" in result.out
