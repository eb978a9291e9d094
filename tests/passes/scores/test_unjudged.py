"""A structure that a score can't judge stays whole; the others of its role are pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import PlanError
from graphprune.pipeline.compiler import compile
from graphprune.report.report import Report

UP = "c.weight:0"
"""The channels that only a transposed convolution reads, which no score of consumers can treat."""


class UNet(nn.Module):
    """One level down and up again, with a skip."""

    def __init__(self, n: int = 16) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, n, 3, padding=1)
        self.b = nn.Conv2d(n, 2 * n, 3, stride=2, padding=1)
        self.c = nn.Conv2d(2 * n, 2 * n, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * n, n, 2, stride=2)
        self.d = nn.Conv2d(2 * n, n, 3, padding=1)
        self.out = nn.Conv2d(n, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        c = torch.relu(self.c(torch.relu(self.b(a))))
        return self.out(torch.relu(self.d(torch.cat([a, self.up(c)], 1))))


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet().eval()


def images(count: int, seed: int) -> Tensor:
    """[count, 3, 16, 16], smooth, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(16, 16), mode="bicubic")


EXAMPLE = (images(2, 9),)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, images(48, 1).numpy())
    return str(path)


def halved(data: str | None, **entries: Any) -> Report:
    recipe: dict[str, Any] = {"remove": {"channels": 0.5}, **entries}
    if data is not None:
        recipe["calibration"] = {"data": data}
    return compile(unet(), recipe, dry_run=True, example=EXAMPLE)


@pytest.mark.parametrize("score", ["obs", "flap", "minitron", "wanda-sp"])
def test_it_stays_whole_with_a_note(data: str, score: str) -> None:
    report = halved(data, score=score)
    (note,) = report.notes
    assert note.startswith(f"{UP} stays whole: score {score} can't see")
    assert report.kept == {"channels": (8 + 16 + 32 + 8 + 8, 16 + 32 + 32 + 16 + 16)}


def test_in_python_it_is_a_warning() -> None:
    program = graphprune.trace(unet(), EXAMPLE)
    with pytest.warns(UserWarning, match=f"{UP} stays whole"):
        plan = graphprune.select(program, {"channels": 0.5}, score="flap", calibration=images(4, 1))
    assert {name: len(units) for name, units in plan.kept_units.items()} == {
        "a.weight:0": 8,
        "b.weight:0": 16,
        "up.weight:1": 8,
        "d.weight:0": 8,
    }


def test_where_nothing_of_the_role_can_be_judged_that_is_an_error(data: str) -> None:
    for score in ("obs", "flap"):
        with pytest.raises(PlanError) as caught:
            halved(data, score=score, include=[UP])
        assert "can be judged by the score" in caught.value.what
        assert f"score {score} can't see" in str(caught.value)
        assert "another score" in str(caught.value)


def test_a_budget_counts_it_as_kept(data: str) -> None:
    dense = sum(p.numel() for p in unet().parameters())
    report = halved(data, remove=None, target={"params": 0.6}, score="obs")
    assert report.after.parameters is not None
    assert 0.59 * dense <= report.after.parameters <= 0.6 * dense
    assert report.kept["channels"][0] >= 32
    assert any(UP in note for note in report.notes)


def test_by_default_the_others_are_still_chosen_by_surgery(data: str, tmp_path: Path) -> None:
    """obs and reconstruct with data, magnitude for what they can't see: no loss is needed."""
    recipe = {"remove": {"channels": 0.5}, "calibration": {"data": data}}
    report = compile(unet(), recipe, tmp_path / "slim", formats=["onnx"], example=EXAMPLE)
    assert report.score == "obs"
    assert any(note.startswith("channels: ranked by magnitude") for note in report.notes)
    assert report.kept == {"channels": (56, 112)}
    blind = compile(
        unet(), {"remove": {"channels": 0.5}}, tmp_path / "blind", formats=["onnx"], example=EXAMPLE
    )
    assert blind.score == "magnitude"
    assert sum("--data FILE" in note for note in blind.notes) == 1
    assert error(tmp_path / "slim") < 0.6 * error(tmp_path / "blind")


def test_an_onnx_file_is_treated_alike(data: str, tmp_path: Path) -> None:
    program = graphprune.trace(unet(), EXAMPLE)
    dense = tmp_path / "dense.onnx"
    graphprune.apply(program, graphprune.Plan(program.fingerprint, {})).save(dense, "onnx")
    recipe = {"remove": {"channels": 0.5}}
    seen = compile(dense, {**recipe, "calibration": {"data": data}}, tmp_path / "slim")
    assert (seen.score, seen.refits is None) == ("obs", False)
    assert any(note.startswith("channels: ranked by magnitude") for note in seen.notes)
    blind = compile(dense, recipe, tmp_path / "blind")
    assert blind.score == "magnitude"
    assert sum("--data FILE" in note for note in blind.notes) == 1
    assert error(tmp_path / "slim") < 0.6 * error(tmp_path / "blind")


def error(folder: Path) -> float:
    """Of a written file on images of its own, in parts of the dense outputs, by ONNX Runtime."""
    held_out = images(32, 2)
    with torch.no_grad():
        wanted = unet()(held_out).numpy()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (name,) = (entry.name for entry in session.get_inputs())
    found = session.run(None, {name: held_out.numpy()})[0]
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
