"""docs/writing-a-pass.md: its mask method, allocation and repair are installed, and run."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import graphprune as gp
from graphprune.cli.app import app
from graphprune.errors import PlanError, RecipeError
from graphprune.solvers import Unstructured
from pass_guide import blocks, install, modules, points

MODEL = """
import torch

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3)
        self.head = torch.nn.Linear(3, 2)  # computes an output, and is left alone

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))

def build():
    return Mlp().eval(), (torch.randn(2, 5),)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A model with the guide's package installed beside it, and data of its own."""
    install(tmp_path, modules(), points())
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mylib", *(f"mylib.{name}" for name in modules())):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "net.py").write_text(MODEL)
    scales = np.array([3, 0.1, 2, 0.2, 1], dtype=np.float32)
    x = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32) * scales
    np.savez(tmp_path / "data.npz", x=x)
    return f"{tmp_path}/net.py:build"


def expected(source, kept):
    """The kept columns of both weights: the inputs of largest norm, by hand in float64."""
    weights = {n: w.double() for n, w in gp.load(source).weights.items()}
    x = torch.from_numpy(np.load(Path(source).parent / "data.npz")["x"]).double()
    up = sorted(x.square().sum(0).topk(kept["up.weight"]).indices.tolist())
    mask = torch.zeros(5, dtype=torch.double)
    mask[up] = 1
    hidden = torch.relu(x @ (weights["up.weight"] * mask).T + weights["up.bias"])
    down = sorted(hidden.square().sum(0).topk(kept["down.weight"]).indices.tolist())
    return {"up.weight": up, "down.weight": down}


def kept_columns(weights):
    """The columns of each matrix that aren't zero, which have no zero."""
    found = {}
    for name in ("up.weight", "down.weight"):
        columns = weights[name].count_nonzero(0)
        assert set(columns.tolist()) <= {0, len(weights[name])}
        found[name] = columns.nonzero().flatten().tolist()
    return found


# Two fifths of 40 weights and five eighths of 24: 0.425 and 0.625 of them, whole columns.
RISING = {"up.weight": 3, "down.weight": 3}


def test_in_a_recipe(source, tmp_path):
    recipe = yaml.safe_load(blocks("yaml")[1])
    recipe["calibration"] = {"data": str(tmp_path / "data.npz")}
    report = gp.compile(source, recipe, tmp_path / "sparse.pt2")
    assert report.masks.method == "columns (least 2)"
    found = gp.load(tmp_path / "sparse.pt2").weights
    assert kept_columns(found) == expected(source, RISING)


def test_on_the_command_line(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--sparsify", "columns", "--sparsity", "50%", "--data", "data.npz", "-o", "a.pt2"]
    ran = CliRunner().invoke(app, ["compile", source, *words])
    assert ran.exit_code == 0, ran.output
    # A half of five columns rounds to two, of eight it is four.
    assert kept_columns(gp.load("a.pt2").weights) == expected(
        source, {"up.weight": 3, "down.weight": 4}
    )


def test_from_python(source, tmp_path):
    from mylib.allocations import Later  # type: ignore[import-not-found]
    from mylib.masks import Columns  # type: ignore[import-not-found]

    data = {"x": torch.from_numpy(np.load(tmp_path / "data.npz")["x"])}
    found = gp.sparsify(
        gp.load(source), data, Columns(), Unstructured(0.5), budget=Later(slope=0.2)
    )
    assert kept_columns(found.program.weights) == expected(source, RISING)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"method": "colums"}, "unknown method 'colums'; did you mean 'columns'?"),
        ({"method": "columns", "most": 3}, "method 'columns' has no option 'most'"),
        ({"method": "columns", "least": "few"}, "option 'least' of method 'columns'"),
        ({"method": "columns", "budget": "latter"}, "did you mean 'later'?"),
        ({"method": "columns", "budget": {"name": "later", "slope": "x"}}, "option 'slope' of"),
    ],
)
@pytest.mark.usefixtures("source")
def test_mistakes_are_told_when_the_recipe_is_read(section, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        gp.Recipe.parse({"sparsify": {"sparsity": 0.5, **section}})


def test_data_is_read_for_nothing_that_needs_none(source, tmp_path):
    """The allocation says that it needs none, and so does magnitude."""
    recipe = {"sparsify": {"method": "magnitude", "sparsity": 0.5, "budget": "later"}}
    report = gp.compile(source, recipe, tmp_path / "sparse.pt2")
    assert report.masks.samples is None


def test_the_repair(source, tmp_path):
    recipe = yaml.safe_load(blocks("yaml")[2])
    report = gp.compile(source, recipe, tmp_path / "slim.pt2")
    assert report.refits.parameters == ("down.weight",)
    dense, slim = gp.load(source).weights, gp.load(tmp_path / "slim.pt2").weights
    units = gp.Plan.load(tmp_path / "slim.pt2.graphprune_plan.json").kept_units["up.weight:0"]
    assert torch.equal(slim["up.weight"], dense["up.weight"][list(units)])
    assert torch.equal(slim["down.weight"], dense["down.weight"][:, list(units)] * 1.5)


@pytest.mark.parametrize(
    ("repair", "message"),
    [
        ("lauder", "unknown repair 'lauder'; did you mean 'louder'?"),
        ({"name": "louder", "loud": 2}, "repair 'louder' has no option 'loud'"),
        ({"name": "louder", "factor": "x"}, "option 'factor' of repair 'louder'"),
        ({"name": "none", "factor": 2}, "repair 'none' has no options"),
    ],
)
@pytest.mark.usefixtures("source")
def test_mistakes_of_repairs(repair, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        gp.Recipe.parse({"remove": {"ffn": 0.5}, "score": "magnitude", "repair": repair})


def test_a_step_of_its_own(source, tmp_path):
    recipe = yaml.safe_load(blocks("yaml")[3])
    report = gp.compile(source, recipe, tmp_path / "slim.pt2")
    assert [one["name"] for one in report.passes] == ["clip", "select"]
    assert "clipped 3 matrices" in report.notes
    dense, slim = gp.load(source).weights, gp.load(tmp_path / "slim.pt2").weights
    assert slim["up.weight"].shape == (6, 5)
    limit = dense["head.weight"].abs().max() / 2
    assert torch.equal(slim["head.weight"], dense["head.weight"].clamp(-limit, limit))
    refused = {"steps": [{"clip": {"share": 2.0}}]}
    with pytest.raises(PlanError, match="clip takes a share"):
        gp.compile(source, refused, tmp_path / "other.pt2")
