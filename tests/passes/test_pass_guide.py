"""docs/writing-a-pass.md does what it says: its score is installed, and its code is run."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import graphprune as gp
import pass_guide
from graphprune.cli.app import app
from graphprune.errors import RecipeError
from graphprune.pipeline import run
from pass_guide import blocks, modules, points

MODEL = """
import torch

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def build():
    return Mlp().eval(), (torch.randn(2, 5),)
"""


def install(folder, monkeypatch, modules, groups):
    """Install a package for the time of a test."""
    pass_guide.install(folder, modules, groups)
    monkeypatch.syspath_prepend(folder)
    for name in ("mylib", *(f"mylib.{name}" for name in modules)):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A model that reads no tokens, with the guide's package installed."""
    install(tmp_path, monkeypatch, modules(), points())
    (tmp_path / "net.py").write_text(MODEL)
    return f"{tmp_path}/net.py:build"


@pytest.fixture
def unread(monkeypatch):
    """Reading calibration data fails."""

    def read(*args, **kwargs):
        raise AssertionError("calibration data was read")

    monkeypatch.setattr(run, "calibration_samples", read)


def best(source, p):
    """The six units of eight with the largest sums, by hand."""
    weights = gp.load(source).weights
    w = {n: weights[n].double().abs() ** p for n in ("up.weight", "up.bias", "down.weight")}
    sums = w["up.weight"].sum(1) + w["up.bias"] + w["down.weight"].sum(0)
    return tuple(sorted(sums.argsort(descending=True)[:6].tolist()))


@pytest.mark.usefixtures("unread")
def test_the_score_in_a_compilation_from_python(source, tmp_path):
    recipe = yaml.safe_load(blocks("yaml")[0])
    report = gp.compile(source, recipe, tmp_path / "slim.pt2")
    assert report.kept == {"ffn": (6, 8)}
    assert report.score == "power"
    plan = gp.Plan.load(tmp_path / "slim.pt2.graphprune_plan.json")
    assert list(plan.kept_units.values()) == [best(source, 3)]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("words", "p"),
    [(["recipe.yaml"], 3), (["--remove", "ffn=0.25", "--score", "power"], 1)],
    ids=["recipe", "flags"],
)
def test_the_score_on_the_command_line(source, tmp_path, words, p, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(blocks("yaml")[0])
    ran = CliRunner().invoke(app, ["compile", source, *words, "-o", "slim.pt2"])
    assert ran.exit_code == 0, ran.output
    plan = gp.Plan.load("slim.pt2.graphprune_plan.json")
    assert list(plan.kept_units.values()) == [best(source, p)]


def test_the_selection(source):
    names = {}
    exec(blocks("python")[1], names)
    program = gp.load(source)
    plan = names["every_other_channel"](program)
    assert list(plan.kept_units.values()) == [(0, 2, 4, 6)]
    gp.verify(program, plan, gp.apply(program, plan)).raise_if_failed()


def test_a_score_that_says_so_is_given_data(tmp_path, monkeypatch):
    code = """
        from dataclasses import dataclass
        from typing import ClassVar
        import numpy as np

        @dataclass(frozen=True)
        class Seen:
            needs_data: ClassVar[bool] = True

            def score(self, program, structures, inputs):
                assert inputs.calibration is not None
                return {s.name: np.arange(s.size, dtype=float)[None] for s in structures}
    """
    groups = {"graphprune.scores": {"seen": "mylib.scores:Seen"}}
    install(tmp_path, monkeypatch, {"scores": textwrap.dedent(code)}, groups)
    (tmp_path / "net.py").write_text(MODEL)
    np.savez(tmp_path / "data.npz", x=np.ones((4, 5), dtype=np.float32))
    calibration = {"data": f"{tmp_path}/data.npz", "windows": 4}
    recipe = {"remove": {"ffn": 0.5}, "score": "seen", "calibration": calibration}
    report = gp.compile(f"{tmp_path}/net.py:build", recipe, dry_run=True)
    assert report.kept == {"ffn": (4, 8)}


@pytest.mark.usefixtures("unread")
def test_wrong_options_are_told_before_data_is_read(source, tmp_path):
    recipe = {"remove": {"ffn": 0.5}, "score": {"name": "power", "q": 2}, "repair": "bias"}
    with pytest.raises(RecipeError, match="score 'power' has no option 'q'"):
        gp.compile(source, recipe, tmp_path / "slim")
