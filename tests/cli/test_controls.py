"""Iterative Prune-and-Tune, and what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import graphprune
from cli.helpers import Result
from graphprune.errors import RecipeError
from graphprune.recipe.recipe import Recipe

Run = Callable[..., Result]
TRAIN = {"loss": "ce", "batch": 2, "lr": 1e-3}


@pytest.fixture(scope="session")
def ids(cycles: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Windows of the text that the small model has learnt, [32, 32]."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(dense)(cycles.read_text())["input_ids"]
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.array(tokens[: 32 * 32]).reshape(32, 32))
    return str(path)


def compiled(source: Path, output: Path, ids: str, text: Path, **more: Any) -> dict[str, Any]:
    """The report of a compilation."""
    calibration = {"data": ids, "general": 0.0, "text": str(text), "length": 32, "windows": 4}
    graphprune.compile(str(source), {"calibration": calibration, "seed": 1, **more}, output)
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def perplexities(report: dict[str, Any], side: str = "after") -> dict[str, float]:
    return {text: one["value"] for text, one in report[side]["perplexities"].items()}


def test_controls_are_what_other_recipes_make(
    taught: Path, ids: str, cycles: Path, tmp_path: Path
) -> None:
    masks = {"sparsify": {"method": "wanda", "sparsity": 0.7}}
    train = {"recover": {"steps": 8, **TRAIN}}
    rounds = [{"repeat": {"rounds": 3, "steps": [masks, train]}}]
    report = compiled(taught, tmp_path / "rounds", ids, cycles, steps=rounds, control=True)
    # Half of the steps are behind the last cut, and the rest in equal parts.
    assert [one["figures"]["steps"] for one in report["trained"]] == [2, 2, 4]
    weights = load_file(tmp_path / "rounds" / "model.safetensors")
    treated = [n for n, w in weights.items() if w.ndim > 1 and (w == 0).float().mean() > 0.5]
    assert len(treated) == 21
    assert all(abs((weights[n] == 0).double().mean() - 0.7) < 0.02 for n in treated)

    controls = {one["name"]: one["perplexities"] for one in report["controls"]}
    once = compiled(taught, tmp_path / "once", ids, cycles, **masks, **train)
    assert controls["one cut, trained alike"] == perplexities(once)
    bare = [{"repeat": {"rounds": 3, "steps": [masks]}}]
    assert controls["not trained"] == perplexities(
        compiled(taught, tmp_path / "bare", ids, cycles, steps=bare)
    )
    dense = compiled(taught, tmp_path / "dense", ids, cycles, **train)
    assert controls["the dense model, trained alike"] == perplexities(dense)
    assert len(controls) == 3


def test_the_dense_model_learns_nothing_from_itself(
    taught: Path, ids: str, cycles: Path, tmp_path: Path
) -> None:
    report = compiled(
        taught, tmp_path / "out", ids, cycles, control=True,
        sparsify={"method": "magnitude", "sparsity": 0.6}, recover={"steps": 2, "batch": 2},
    )  # fmt: skip
    (control,) = report["controls"]
    assert control["name"] == "not trained"


def test_controls_of_models_without_perplexity(tmp_path: Path) -> None:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "x.npy", x.numpy())
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
    ).eval()
    report = graphprune.compile(
        module,
        {
            "remove": {"ffn": 0.25}, "score": "magnitude", "control": True, "formats": ["pt2"],
            "recover": {"steps": 2, "batch": 4}, "calibration": {"data": str(tmp_path / "x.npy")},
        },
        tmp_path / "out.pt2",
        example=(x[:2],),
    )  # fmt: skip
    assert report.controls == ()
    assert any("no controls" in note for note in report.notes)


def test_a_control_is_of_training() -> None:
    with pytest.raises(RecipeError, match="nothing is trained here"):
        Recipe.parse({"remove": {"ffn": 0.5}, "control": True})


def test_a_tuned_teacher_is_the_dense_model_trained_by_itself(
    taught: Path, ids: str, tmp_path: Path
) -> None:
    calibration = {"data": ids, "general": 0.0}
    masks = {"sparsify": {"method": "magnitude", "sparsity": 0.6}}

    def weights(source: Path, name: str, **recipe: Any) -> dict[str, torch.Tensor]:
        whole = {"calibration": calibration, "seed": 1, **recipe}
        graphprune.compile(str(source), whole, tmp_path / name)
        return dict(load_file(tmp_path / name / "model.safetensors"))

    budget = {"steps": 3, "batch": 4}
    weights(taught, "teacher", recover={"loss": "ce", **budget})
    tuned = weights(
        taught,
        "tuned",
        **masks,
        recover={"teacher": "tuned", "lr": 1e-3, "train": "lora", **budget},
    )
    given = weights(
        taught,
        "given",
        **masks,
        recover={"teacher": str(tmp_path / "teacher"), "lr": 1e-3, "train": "lora", **budget},
    )
    plain = weights(taught, "plain", **masks, recover={"lr": 1e-3, "train": "lora", **budget})
    assert all(torch.equal(tuned[name], given[name]) for name in given)
    assert not all(torch.equal(tuned[name], plain[name]) for name in plain)
