"""LLM-Shearing from the command line: the shipped recipe, every role at once, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from cli.helpers import Result, few_windows
from graphprune.errors import RecipeError
from graphprune.recipe.recipe import Recipe

Run = Callable[..., Result]


def test_the_shipped_recipe_compiles_a_model(
    run: Run, taught: Path, cycles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Recipe.load("shearing.yaml")
    assert [one.name for one in found.passes] == ["shear", "recover"]
    monkeypatch.chdir(tmp_path)
    shorter = Recipe.load("shearing.yaml").model_dump(mode="json", exclude_defaults=True)
    for step in shorter["steps"]:
        for options in step.values():
            options.update(steps=3)
    path = few_windows(tmp_path / "recipe.yaml", cycles, shorter["steps"])
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 0, made.err
    assert AutoConfig.from_pretrained(tmp_path / "slim").intermediate_size == 48
    report = json.loads((tmp_path / "slim" / "report.json").read_text())
    assert [one["name"] for one in report["passes"]] == ["shear", "recover"]
    assert report["trained"][0]["method"] == "shear"
    assert report["trained"][0]["figures"]["steps"] == 3
    assert run("verify", tmp_path / "slim").code == 0


def test_every_role_at_once_has_the_exact_shape(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    shape = {"hidden": 42, "ffn": 40, "layers": 2, "kv_heads": 2, "query_heads": 1}
    steps = [{"shear": {"shape": shape, "steps": 4, "batch": 4, "score": "magnitude"}}]
    path = few_windows(tmp_path / "recipe.yaml", cycles, steps)
    assert run("compile", taught, path, "--dry-run").code == 0
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 0, made.err
    config = AutoConfig.from_pretrained(tmp_path / "slim")
    assert (config.hidden_size, config.intermediate_size) == (42, 40)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (2, 2)
    assert config.num_attention_heads == 2
    assert config.head_dim == AutoConfig.from_pretrained(taught).head_dim  # whatever the width is
    assert config.tie_word_embeddings
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)
    again = run("compile", taught, path, "-o", tmp_path / "again")
    assert again.code == 0
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("slim", "again")
    )
    assert first == second


def test_gates_share_a_budget_as_they_will(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    goal = {"target": {"params": 0.8}, "uniform": False, "steps": 6, "batch": 4}
    goal |= {"train": "norms"}  # so that gates alone change the matrices
    path = few_windows(tmp_path / "recipe.yaml", cycles, [{"shear": goal}])
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 0, made.err
    dense, slim = (
        sum(w.numel() for w in load_file(folder / "model.safetensors").values())
        for folder in (taught, tmp_path / "slim")
    )
    assert 0.79 * dense < slim <= 0.8 * dense
    assert run("verify", tmp_path / "slim").code == 0


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([{"shear": {}}], "exactly one of remove, target, shape"),
        ([{"shear": {"remove": {"ffn": 0.5}, "shape": {"ffn": 8}}}], "exactly one of"),
        ([{"select": {"remove": {"ffn": 0.5}}}, {"shear": {"remove": {"ffn": 0.5}}}], "first"),
        ([{"shear": {"remove": {"ffn": 0.5}, "gate_lr": -1}}], "gate_lr"),
        ([{"shear": {"remove": {"ffn": "1/3", "kv_head": "25%"}}}], "did you mean 'kv_heads'"),
    ],
)
def test_mistakes_are_told(steps: list[Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe.parse({"steps": steps})


def test_a_shape_out_of_reach_is_refused_before_data_is_read(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    steps = [{"shear": {"shape": {"ffn": 65}}}]
    path = few_windows(tmp_path / "recipe.yaml", cycles, steps)
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 1
    assert "ffn 65 is not reachable" in made.err
    assert "reading calibration data" not in made.err
