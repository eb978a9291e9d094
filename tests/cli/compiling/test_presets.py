"""Each shipped recipe that is no long training run does to a tiny model what its head says."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from graphprune.recipe.shipped import recipe_file, shipped


@pytest.fixture
def compile_by(run, taught, cycles, tmp_path):
    """Compile the taught model by a recipe, on little data; return the report and the weights."""

    def call(name):
        data = {"data": str(cycles), "windows": 64, "length": 24, "general": 0.0}
        recipe = yaml.safe_load(recipe_file(name).read_text()) | {"calibration": data}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        output = tmp_path / "out"
        done = run("compile", taught, tmp_path / "recipe.yaml", "-o", output)
        assert done.code == 0, done.err
        report = json.loads((output / "report.json").read_text())
        return report, load_file(output / "model.safetensors")

    return call


def test_every_recipe_that_is_asked_for_is_there():
    wanted = "llm-pruner shearing minitron flap wanda-2of4 sparsegpt-50 best-quality cnn".split()
    assert {f"{name}.yaml" for name in wanted} <= set(shipped())
    assert {recipe_file(name).name for name in wanted} <= set(shipped())  # without .yaml too


@pytest.mark.slow  # each prunes, refits or trains, and measures: some ten seconds
@pytest.mark.parametrize("name", ["llm-pruner", "minitron", "flap"])
def test_structures_go(name, compile_by):
    report, weights = compile_by(name)
    if name == "flap":  # over all layers: not in each as much
        assert report["kept"]["ffn"][0] < report["kept"]["ffn"][1] == 3 * 64
        assert any(key.endswith("down_proj.bias") for key in weights)
    else:
        assert weights["model.layers.0.mlp.up_proj.weight"].shape == (48, 48)
        assert report["trained"]


def test_zeros_in_a_pattern(compile_by):
    _, weights = compile_by("wanda-2of4")
    weight = weights["model.layers.1.mlp.up_proj.weight"]
    assert ((weight.view(-1, 4) == 0).sum(dim=1) == 2).all()


def test_half_of_all_weights(compile_by):
    _, weights = compile_by("sparsegpt-50")
    weight = weights["model.layers.1.mlp.up_proj.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2


@pytest.mark.slow  # it matches blocks and trains
def test_best_quality(compile_by):
    report, _ = compile_by("best-quality")
    assert report["after"]["parameters"] <= 0.8 * report["before"]["parameters"]
    assert report["trained"]


def test_channels(run, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
                        nn.Flatten(), nn.Linear(64 * 16, 5)).eval()  # fmt: skip
    torch.onnx.export(net, (torch.randn(2, 3, 8, 8),), tmp_path / "net.onnx", dynamo=True)
    done = run("compile", tmp_path / "net.onnx", "cnn", "-o", tmp_path / "slim.onnx")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "slim.onnx.report.json").read_text())
    assert report["kept"]["channels"] == [96, 128]
