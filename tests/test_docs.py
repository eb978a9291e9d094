"""What docs/ shows is what happens."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import graphprune as gp
from graphprune.pipeline.compiler import compile
from graphprune.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
DOCS = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)


def test_a_model_of_ones_own(tmp_path):
    (code,) = blocks("docs/your-own-model.md", "python")
    (tmp_path / "tagger.py").write_text(code)
    source = f"{tmp_path}/tagger.py:build"
    torch.manual_seed(3)
    dense = gp.load(source)
    weights = {n: torch.randn(s) / 8 for n, s in dense.parameters.items() if n in dense.trainable}
    save_file(weights, tmp_path / "tagger.safetensors")
    report = compile(source, {"remove": {"ffn": 0.5}}, tmp_path / "slim",
                     weights=tmp_path / "tagger.safetensors")  # fmt: skip
    assert report.kept == {"ffn": (48, 96)}
    slim = torch.export.load(tmp_path / "slim" / "model.pt2")
    assert slim.state_dict["head.weight"].shape == (12, 48)
    ranges = [(r.lower, r.upper) for r in slim.range_constraints.values()]
    assert (2, 512) in ranges
    tokens, scale = torch.randint(0, 1000, (3, 40)), torch.ones(3, 1, 1)
    assert slim.module()(tokens, scale=scale)["scores"].shape == (3, 40, 12)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/choosing-what-to-prune.md",
        "docs/depth.md",
        "docs/streaming.md",
        "docs/recipes.md",
    ],
)
def test_recipes_parse(name):
    for block in blocks(name, "yaml"):
        Recipe.parse(yaml.safe_load(block))


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
