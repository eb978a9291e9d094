"""Recipes as lists of passes: what they do, what repeats do, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import nn

import graphprune
from graphprune import registry
from graphprune.errors import RecipeError
from graphprune.passes.protocol import Context, Record, State
from graphprune.pipeline.compiler import choose
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe
from graphprune.streaming import apply_weights


class MLP(nn.Module):
    """Three layers, whose middle widths can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 32)
        self.b = nn.Linear(32, 24)
        self.c = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "x.npy"
    import numpy as np

    np.save(path, X.numpy())
    return str(path)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.export.load(path).state_dict)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


FLAT: dict[str, Any] = {
    "remove": {"a.weight:0": 0.25},
    "score": "flap",
    "repair": "reconstruct",
    "sparsify": {"method": "wanda", "sparsity": 0.5},
}
STEPS: list[Any] = [
    {"select": {"remove": {"a.weight:0": 0.25}, "score": "flap"}},
    {"repair": "reconstruct"},
    {"sparsify": {"method": "wanda", "sparsity": 0.5}},
]


def test_flat_keys_are_the_same_as_steps(tmp_path: Path, data: str) -> None:
    calibration = {"data": data}
    flat = graphprune.compile(
        mlp(), {**FLAT, "calibration": calibration}, tmp_path / "1.pt2", example=(X,)
    )
    listed = graphprune.compile(
        mlp(), {"steps": STEPS, "calibration": calibration}, tmp_path / "2.pt2", example=(X,)
    )
    assert same(weights(tmp_path / "1.pt2"), weights(tmp_path / "2.pt2"))
    assert weights(tmp_path / "1.pt2")["a.weight"].shape == (24, 12)
    assert flat.passes == listed.passes
    assert [one["name"] for one in flat.passes] == ["select", "repair", "sparsify"]
    assert flat.passes[2]["options"] == {"method": "wanda", "sparsity": 0.5}
    assert flat.notes == listed.notes
    stored = json.loads(Path(f"{tmp_path / '2.pt2'}.report.json").read_text())
    assert stored["passes"] == [dict(one) for one in listed.passes]


def test_the_recipe_that_is_written_makes_it_again(tmp_path: Path, data: str) -> None:
    recipe = {"steps": STEPS, "calibration": {"data": data}}
    graphprune.compile(mlp(), recipe, tmp_path / "1.pt2", example=(X,))
    written = f"{tmp_path / '1.pt2'}.recipe.yaml"
    graphprune.compile(mlp(), written, tmp_path / "2.pt2", example=(X,))
    assert same(weights(tmp_path / "1.pt2"), weights(tmp_path / "2.pt2"))
    text = yaml.safe_load(Path(written).read_text())
    assert text["steps"][0]["select"]["score"] == {"name": "flap"}


def test_a_second_selection_counts_from_the_dense_model(tmp_path: Path) -> None:
    """Goals are fractions of the dense model, whatever went before: 32 -> 24 -> 16."""
    steps = [
        {"select": {"remove": {"a.weight:0": share}, "score": "magnitude"}} for share in (0.25, 0.5)
    ]
    report = graphprune.compile(mlp(), {"steps": steps}, tmp_path / "1.pt2", example=(X,))
    assert weights(tmp_path / "1.pt2")["a.weight"].shape == (16, 12)
    assert report.max_abs_error is not None
    assert report.max_abs_error < 1e-9


@pytest.mark.parametrize(
    ("sparsity", "shares"),
    [(0.75, [1 - 0.25 ** (1 / 2), 0.75]), ([0.25, 0.625], [0.25, 0.625])],
    ids=["in equal ratios", "as listed"],
)
def test_rounds_of_masks(tmp_path: Path, data: str, sparsity: object, shares: list[float]) -> None:
    """Zeros of a round stay, and each round has the sparsity that it should have."""
    steps = [{"sparsify": {"method": "magnitude", "sparsity": sparsity}}]
    recipe = {"steps": [{"repeat": {"rounds": 2, "steps": steps}}]}
    whole = graphprune.compile(mlp(), recipe, tmp_path / "all.pt2", example=(X,))
    first = {"sparsify": {"method": "magnitude", "sparsity": shares[0]}}
    graphprune.compile(mlp(), first, tmp_path / "first.pt2", example=(X,))
    found, before = weights(tmp_path / "all.pt2"), weights(tmp_path / "first.pt2")
    for name in ("a.weight", "b.weight"):
        zeros = int((found[name] == 0).sum())
        assert zeros == pytest.approx(shares[1] * found[name].numel(), abs=1)
        assert (found[name][before[name] == 0] == 0).all()
    assert [one["round"] for one in whole.passes] == [[1, 2], [2, 2]]


def test_rounds_of_structures_with_repairs(tmp_path: Path, data: str) -> None:
    """Each round chooses in the model as it is repaired, and the end has the exact width."""
    steps = [
        {"select": {"remove": {"a.weight:0": 0.5}, "score": "flap"}},
        {"repair": "reconstruct"},
    ]
    recipe = {
        "steps": [{"repeat": {"rounds": 2, "steps": steps}}],
        "calibration": {"data": data},
    }
    report = graphprune.compile(mlp(), recipe, tmp_path / "1.pt2", example=(X,))
    found = weights(tmp_path / "1.pt2")
    assert found["a.weight"].shape == (16, 12)
    plan = Plan.load(f"{tmp_path / '1.pt2'}.graphprune_plan.json")
    kept = [int(str(unit)) for unit in plan.kept_units["a.weight:0"]]
    # The second round chooses other units than a single one would, or the same: the weights tell
    # which model they were taken from, and what reads them has been fitted.
    assert torch.equal(found["a.weight"], mlp().a.weight.detach()[kept])
    dense, slim = mlp()(X), torch.export.load(tmp_path / "1.pt2").module()(X)
    cut = mlp()
    with torch.no_grad():
        gone = [i for i in range(32) if i not in kept]
        cut.b.weight[:, gone] = 0
    assert (slim - dense).square().mean() < (cut(X) - dense).square().mean()
    assert report.refits is not None


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "'steps' is empty"),
        ([{"selct": {}}], "unknown pass 'selct'; did you mean 'select'?"),
        ([{"select": {"remov": {"ffn": 1}}}], "unknown key 'steps.0.select.remov'"),
        ([{"select": {"score": "taylor"}}], "exactly one of remove, target, shape"),
        (["repair"], "in 'steps.0.repair.name': Field required"),
        ([{"repair": "reconstruct"}], "put it behind select or replay"),
        ([{"repair": "auto"}], "a step names its repair"),
        ([{"repair": "none"}], "a step names its repair: bias, match, reconstruct"),
        ([{"repeat": {"rounds": 2, "steps": [{"sparsify": {"method": "wand"}}]}}], "wanda"),
        (
            [{"repeat": {"rounds": 2, "steps": [{"sparsify": {"method": "wanda",
             "sparsity": [0.1, 0.2, 0.3]}}]}}],
            "has 3 numbers for 2 rounds",
        ),
        (
            [{"repeat": {"rounds": 2, "steps": [{"select": {"remove": {"ffn": 0.5},
             "score": "obs"}}]}}],
            "score obs chooses in one round",
        ),
        ([{"select": {"remove": {"ffn": 0.1}}}, {"replay": "plan.json"}], "put replay first"),
    ],
)  # fmt: skip
def test_mistakes(steps: list[Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"steps": steps})
    assert message in f"{caught.value.what} {caught.value.why}"


def test_flat_keys_do_not_stand_beside_steps() -> None:
    with pytest.raises(RecipeError, match="'remove' stands beside steps"):
        Recipe.parse({"steps": STEPS, "remove": {"ffn": 0.1}})
    with pytest.raises(RecipeError, match="leave one of them out"):
        Recipe.parse({"steps": STEPS, "effort": "best"})


@dataclass(frozen=True)
class Halve:
    """A pass of another package: half of every weight of a name.

    Attributes:
        parameter: the name.
    """

    needs_data: ClassVar[bool] = False
    parameter: str = "c.weight"

    def check(self, state: State, context: Context) -> None:
        if self.parameter not in state.program.parameters:
            raise RecipeError(f"there is no {self.parameter}")

    def run(self, state: State, context: Context) -> State:
        new = {self.parameter: state.program.weights[self.parameter] / 2}
        program = apply_weights(state.program, new)
        return replace(state, program=program).recorded(Record("halve", ("halved",)))

    def preview(self, state: State, context: Context) -> State:
        return state.recorded(Record("halve"))

    def describe(self, state: State) -> str:
        return f"halve {self.parameter}"


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        if group != "graphprune.passes":
            return []
        return [EntryPoint("halve", f"{__name__}:Halve", group)]

    monkeypatch.setattr(registry, "entry_points", entry_points)


@pytest.mark.usefixtures("_installed")
def test_a_pass_of_another_package(tmp_path: Path) -> None:
    recipe = {"steps": [{"halve": {"parameter": "b.weight"}}, "halve"]}
    report = graphprune.compile(mlp(), recipe, tmp_path / "1.pt2", example=(X,))
    found, dense = weights(tmp_path / "1.pt2"), mlp()
    assert torch.equal(found["b.weight"], dense.b.weight.detach() / 2)
    assert torch.equal(found["c.weight"], dense.c.weight.detach() / 2)
    assert report.notes.count("halved") == 1
    told = graphprune.compile(mlp(), recipe, dry_run=True, example=(X,)).forecast
    assert told is not None
    assert told.passes[:2] == ("halve b.weight", "halve c.weight")
    with pytest.raises(RecipeError, match="has no option 'parametr'"):
        Recipe.parse({"steps": [{"halve": {"parametr": "b"}}]})
    with pytest.raises(RecipeError, match="there is no d"):
        graphprune.compile(
            mlp(), {"steps": [{"halve": {"parameter": "d"}}]}, tmp_path / "2.pt2", example=(X,)
        )


def test_steps_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from graphprune.cli import app as cli

    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), "
        "(torch.zeros(2, 8),)\n"
    )
    (tmp_path / "steps.yaml").write_text(
        "steps:\n- select: {remove: {'0.weight:0': 0.5}, score: magnitude}\n"
    )
    words = ["compile", f"{tmp_path / 'net.py'}:build", str(tmp_path / "steps.yaml"), "--dry-run"]
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert not caught.value.code
    assert "rank units by magnitude; cut; verify" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["grasp", "loraprune", "shear"])
def test_what_is_chosen_by_training_is_no_plan_alone(name: str) -> None:
    program = graphprune.trace(mlp(), (X[:2],))
    recipe = Recipe.parse({"steps": [{name: {"remove": {"ffn": 0.5}, "steps": 2}}]})
    with pytest.raises(RecipeError, match=f"{name} chooses units while the weights train"):
        choose(program, recipe)
