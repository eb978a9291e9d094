"""LoRAPrune as a step of a recipe, and as a recipe that comes with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import graphprune.cli.progress
from cli.helpers import Result, check_failure
from graphprune.errors import RecipeError
from graphprune.pipeline.compiler import compile
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.shipped import shipped

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def windows(cycles: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Windows of the text that the small model has learnt, [256, 16]."""
    tokens = AutoTokenizer.from_pretrained(dense)(cycles.read_text())["input_ids"]
    path = tmp_path_factory.mktemp("windows") / "ids.npy"
    np.save(path, np.array(tokens[: 256 * 16]).reshape(256, 16))
    return str(path)


def test_the_recipe_of_the_paper_is_found_by_its_name(
    run: Run, taught: Path, windows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(graphprune.cli.progress, "MINUTE", 0)
    found = run("compile", taught, "loraprune.yaml", "--data", windows, "-o", tmp_path / "slim")
    assert found.code == 0, found.err
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["intermediate_size"] == 32
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads == (2, 1)  # of 6 and 3
    report = json.loads((tmp_path / "slim" / "report.json").read_text())
    assert [one["name"] for one in report["passes"]] == ["loraprune"]
    (trained,) = report["trained"]
    assert trained["figures"]["events"][-1]["removed"] == 3 * (32 + 2)
    assert trained["figures"]["events"][-1]["share"] == 1
    assert report["max_abs_error"] <= 1e-9
    assert f"step {trained['figures']['steps']} of {trained['figures']['steps']}" in found.err
    assert "left" in found.err
    assert run("verify", tmp_path / "slim").code == 0


@pytest.mark.slow  # two compilations, of which each measures the model
def test_an_interrupted_compilation_goes_on_to_the_same_bytes(
    taught: Path, windows: str, tmp_path: Path
) -> None:
    recipe = {
        "steps": [{"loraprune": {"target": {"params": 0.8}, "uniform": False, "steps": 12}}],
        "calibration": {"data": windows, "general": 0.0},
        "seed": 1,
    }

    class Stopped(Exception):
        pass

    def stop(told: str) -> None:
        if "step 8 of 12" in told:
            raise Stopped

    with pytest.raises(Stopped):
        compile(str(taught), recipe, tmp_path / "one", progress=stop)
    assert not (tmp_path / "one").exists()
    compile(str(taught), recipe, tmp_path / "one", resume=True)
    compile(str(taught), recipe, tmp_path / "two")
    for name in ("model.safetensors", "config.json", "graphprune_plan.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_dry_run_knows_the_sizes(run: Run, taught: Path, windows: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{loraprune: {shape: {ffn: 40, kv_heads: 2}, steps: 10}}]")
    found = run("compile", taught, recipe, "--data", windows, "--dry-run", "--json")
    assert found.code == 0, found.err
    sizes = {s["role"]: s["after"] for s in json.loads(found.out)["forecast"]["sizes"]}
    assert sizes == {"ffn": 40, "kv_heads": 2}


def test_shipped_recipes_parse_and_a_file_of_that_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = [name for name in shipped() if name.startswith("loraprune")]
    assert ours == ["loraprune-short.yaml", "loraprune.yaml"]
    for name in ours:
        (one,) = Recipe.load(name).passes
        assert one.name == "loraprune"
    (paper,) = Recipe.load("loraprune.yaml").passes
    wanted = {"epochs": 2, "batch": 128, "lr": 1e-4, "rank": 8, "alpha": 16, "dropout": 0.05}
    assert wanted.items() <= paper.options.items()
    Path("loraprune.yaml").write_text("remove: {ffn: 0.5}")
    assert Recipe.load("loraprune.yaml").remove == {"ffn": 0.5}
    with pytest.raises(RecipeError, match="does not exist"):
        Recipe.load(tmp_path / "elsewhere" / "loraprune.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "loraprune has exactly one of remove, target, shape; this one has none"),
        ({"remove": {"ffn": 0.5}, "shape": {"ffn": 8}}, "this one has remove and shape"),
        ({"remove": {"fnn": 0.5}}, "did you mean 'ffn'"),
        ({"remove": {"ffn": 1.5}}, "not a fraction to remove"),
        ({"shape": {"ffn": 8}, "align": 8}, "says nothing to a shape"),
        ({"remove": {"ffn": 0.5}, "initial": 0.7, "rest": 0.7}, "would end before it begins"),
        ({"remove": {"ffn": 0.5}, "score": "taylor"}, "has no option 'score'"),
        ({"remove": {"ffn": 0.5}, "train": "full"}, "option 'train'"),
        ({"remove": {"ffn": 0.5}, "gradient": "weights"}, "option 'gradient'"),
        ({"remove": {"ffn": 0.5}, "batch": 0}, "batch"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({"steps": [{"loraprune": options}]})


@pytest.mark.parametrize(
    "steps",
    [
        [{"select": {"remove": {"ffn": 0.5}}}, {"loraprune": {"remove": {"ffn": 0.5}}}],
        [{"repeat": {"rounds": 2, "steps": [{"loraprune": {"remove": {"ffn": 0.5}}}]}}],
    ],
)
def test_it_is_the_first_that_removes_anything(steps: list[dict[str, object]]) -> None:
    with pytest.raises(RecipeError, match="put it first"):
        Recipe.parse({"steps": steps})


def test_a_role_that_the_model_lacks_is_told_before_data_is_read(
    run: Run, taught: Path, windows: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{loraprune: {remove: {experts: 0.5}, steps: 10}}]")
    found = run("compile", taught, recipe, "--data", windows, "-o", tmp_path / "slim")
    check_failure(found, "experts")
    assert "reading calibration data" not in found.err
