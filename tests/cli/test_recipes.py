"""`graphprune recipes` and `graphprune explain`."""

from __future__ import annotations

import json

import pytest
import yaml

from cli.helpers import check_failure
from graphprune.recipe.explaining import explain
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.shipped import recipe_file, shipped
from graphprune.recipe.steps import LEARNING


def test_shipped_recipes_are_listed_and_printed(run):
    listed = run("recipes")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == list(shipped())
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed.out.splitlines())
    assert set(json.loads(run("recipes", "--json").out)) == set(shipped())
    for name in shipped():
        text = recipe_file(name).read_text()
        assert run("recipes", name).out == text
        assert run("recipes", name.removesuffix(".yaml")).out == text


def test_a_recipe_that_is_not_shipped(run):
    check_failure(run("recipes", "sheering"), "no recipe 'sheering'", "did you mean 'shearing'")


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_explained(name, run):
    result = run("explain", name)
    assert result.code == 0, result.err
    recipe = yaml.safe_load(recipe_file(name).read_text())
    first = next(iter(recipe.get("steps", [recipe])[0]))
    if first in LEARNING:  # the others have sentences of their own
        assert result.out.startswith(f"{first}: ")
    assert all(line.endswith(".") for line in result.out.splitlines())


SAID = [
    ({"remove": {"ffn": 0.25, "heads": "1/3"}}, "Removes 25 % of ffn and 33.33 % of heads."),
    ({"target": {"params": 0.7}}, "Removes units until at most 70 % of the parameters are left."),
    ({"target": {"bytes": "100M"}}, "at most 100,000,000 bytes of weights are left."),
    ({"shape": {"hidden": 2048, "layers": 24}}, "to exactly 2,048 hidden and 24 layers."),
    ({"remove": {"*": 0.5}, "score": "flap"}, "Units are ranked by score flap; the lowest go."),
    ({"remove": {"*": 0.5}}, "50 % of the units of every prunable role"),
    ({"remove": {"ffn": 0.5}, "uniform": False}, "Units of all layers are ranked together"),
    ({"remove": {"ffn": 0.5}, "exclude": ["a.*", "b.*"]}, "a.* and b.* stay whole."),
    ({"remove": {"ffn": 0.5}, "align": 64}, "What stays is a multiple of 64 (all widths)."),
    ({"remove": {"ffn": 0.5}, "minimum": 0.1}, "Every structure keeps at least 10 %."),
    ({"remove": {"ffn": 0.5}, "score": "flap", "rounds": 3}, "This is done in 3 rounds"),
    ({"remove": {"ffn": 0.5}, "repair": "reconstruct"}, "refitted by reconstruct."),
    ({"sparsify": {"method": "wanda", "sparsity": "50%"}}, "50 % of the single weights become"),
    ({"sparsify": {"method": "wanda", "pattern": "2:4"}}, "Of every 4 weights 2 stay"),
    ({"plan": "plan.json"}, "The units that the plan plan.json names stay"),
    ({"remove": {"ffn": 0.5}, "fail_if": ["kl>0.1", "perplexity>+5%"]},
     "Nothing is written if kl>0.1 or perplexity>+5%."),
    ({"remove": {"ffn": 0.5}, "score": "magnitude"}, "No calibration data is read."),
    ({"remove": {"ffn": 0.5}, "calibration": {"data": "a.txt", "windows": 9}},
     "It is calibrated on a.txt, 9 windows of it."),
    ({"remove": {"ffn": 0.5}, "formats": ["hf", "onnx"]}, "Writes hf and onnx."),
    ({"remove": {"ffn": 0.5}, "effort": "fast"}, "no weight is changed (effort fast)"),
    ({"remove": {"ffn": 0.5}, "recover": {"tokens": "160K"}}, "with tokens 160K."),
    ({"steps": [{"repeat": {"rounds": 2, "steps": [
        {"select": {"remove": {"ffn": 0.5}, "score": "flap"}}, {"repair": "reconstruct"}]}}]},
     "This is done in 2 rounds"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "sentence"), SAID)
def test_what_a_recipe_says_is_explained(data, sentence):
    said = " ".join(explain(Recipe.parse(data)))
    assert sentence in said
    assert "matching block" not in said


def test_an_explanation_needs_a_valid_recipe(run, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("remove: {fnn: 0.5}\n")
    check_failure(run("explain", file), "unknown role 'fnn'")
    check_failure(run("explain", tmp_path / "none.yaml"), "none.yaml")
