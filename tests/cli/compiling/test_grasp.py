"""Hard-budget gates from the command line: the shipped recipe, budgets, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from cli.helpers import Result, few_windows
from graphprune.errors import RecipeError
from graphprune.recipe.recipe import Recipe

Run = Callable[..., Result]


def test_the_shipped_recipe_compiles_a_model(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    shorter = Recipe.load("grasp.yaml").model_dump(mode="json", exclude_defaults=True)
    assert [next(iter(step)) for step in shorter["steps"]] == ["grasp", "repair"]
    shorter["steps"][0]["grasp"].update(steps=4)
    path = few_windows(tmp_path / "recipe.yaml", cycles, shorter["steps"])
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 0, made.err
    assert AutoConfig.from_pretrained(tmp_path / "slim").intermediate_size == 48
    report = json.loads((tmp_path / "slim" / "report.json").read_text())
    assert [one["name"] for one in report["passes"]] == ["grasp", "repair"]
    assert report["trained"][0]["method"] == "grasp"
    assert run("verify", tmp_path / "slim").code == 0
    again = run("compile", taught, path, "-o", tmp_path / "again")
    assert again.code == 0
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("slim", "again"))
    assert one == two


def test_an_uneven_budget_is_kept(run: Run, taught: Path, cycles: Path, tmp_path: Path) -> None:
    goal = {"target": {"params": 0.8}, "uniform": False, "steps": 4, "batch": 4}
    path = few_windows(tmp_path / "recipe.yaml", cycles, [{"grasp": goal}])
    assert run("compile", taught, path, "--dry-run").code == 0
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 0, made.err
    dense, slim = (
        sum(w.numel() for w in load_file(folder / "model.safetensors").values())
        for folder in (taught, tmp_path / "slim")
    )
    assert 0.79 * dense < slim <= 0.8 * dense
    assert run("verify", tmp_path / "slim").code == 0


def test_every_role_at_once_has_the_exact_shape(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    shape = {"hidden": 42, "ffn": 40, "layers": 2, "kv_heads": 2, "query_heads": 1}
    path = few_windows(tmp_path / "recipe.yaml", cycles, [{"grasp": {"shape": shape, "steps": 4}}])
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 0, made.err
    config = AutoConfig.from_pretrained(tmp_path / "slim")
    assert (config.hidden_size, config.intermediate_size) == (42, 40)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (2, 2)
    assert config.num_attention_heads == 2
    assert run("verify", tmp_path / "slim").code == 0


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([{"grasp": {}}], "grasp has exactly one of remove, target, shape"),
        ([{"grasp": {"remove": {"ffn": 0.5}, "scaling": 2}}], "scaling"),
        ([{"grasp": {"remove": {"ffn": 0.5}, "lr": 1}}], "lr"),
        ([{"grasp": {"remove": {"fnn": 0.5}}}], "did you mean 'ffn'"),
        ([{"grasp": {"remove": {"ffn": "150%"}}}], "not a fraction to remove"),
        ([{"select": {"remove": {"ffn": 0.5}}}, {"grasp": {"remove": {"ffn": 0.5}}}], "first"),
    ],
)
def test_mistakes_are_told(steps: list[Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe.parse({"steps": steps})
