"""Domains whose shares follow their losses, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.helpers import Result
from graphprune.errors import RecipeError
from graphprune.recipe.recipe import Recipe

Run = Callable[..., Result]
OPTIONS = {"steps": 4, "batch": 4, "domains": {"every": 2, "held_out": 0.25}}


def recipe(folder: Path, cycles: Path, steps: list[Any]) -> Path:
    """A recipe whose data is what the model has learnt, and that with other letters in it."""
    other = folder / "other.txt"
    text = list(cycles.read_text()[:6000])
    text[::9] = sorted(text[::9])
    other.write_text("".join(text))
    data = {"data": {"known": str(cycles), "foreign": str(other)}, "windows": 24, "length": 24}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"calibration": data, "seed": 1, "steps": steps}))
    return path


def domains_of(output: Path) -> list[dict[str, Any]]:
    report = json.loads((output / "report.json").read_text())
    found: list[dict[str, Any]] = [one["figures"]["domains"] for one in report["trained"]]
    return found


def test_a_domain_that_falls_behind_the_dense_model_gets_more(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    steps = [
        {"shear": {"remove": {"ffn": 0.5}, **OPTIONS}},
        {"recover": {"loss": "ce", **OPTIONS, "domains": {"every": 2, "floor": 0.1}}},
    ]
    path = recipe(tmp_path, cycles, steps)
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 0, made.err
    for found in domains_of(tmp_path / "slim"):
        assert set(found["reference"]) == {"known", "foreign"}
        # The model knows one of the texts: what it loses of that is what it is to get back.
        assert found["reference"]["known"] < found["reference"]["foreign"]
        assert [one["step"] for one in found["history"]] == [2, 4]
        last = found["history"][-1]
        assert sum(last["shares"].values()) == pytest.approx(1)
        behind = {n: last["losses"][n] - found["reference"][n] for n in last["losses"]}
        if behind["known"] > max(behind["foreign"], 0):
            assert last["shares"]["known"] > 0.5
    assert min(domains_of(tmp_path / "slim")[1]["history"][-1]["shares"].values()) >= 0.1


def test_reference_losses_in_a_file(run: Run, taught: Path, cycles: Path, tmp_path: Path) -> None:
    losses = tmp_path / "losses.json"
    losses.write_text(json.dumps({"known": 0.0, "foreign": 100.0}))
    own = {"reference": str(losses), "every": 2, "shares": {"known": 0.25, "foreign": 0.75}}
    steps = [{"recover": {"loss": "ce", "steps": 4, "batch": 4, "domains": own}}]
    path = recipe(tmp_path, cycles, steps)
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 0, made.err
    (found,) = domains_of(tmp_path / "slim")
    shares = [one["shares"]["known"] for one in found["history"]]
    assert 0.25 < shares[0] < shares[1]
    losses.write_text(json.dumps({"known": 0.0}))
    made = run("compile", taught, path, "-o", tmp_path / "again")
    assert made.code == 1
    assert "missing: foreign" in made.err
    losses.unlink()
    made = run("compile", taught, path, "-o", tmp_path / "again")
    assert "reference losses can't be read" in made.err
    assert "reading calibration data" not in made.err


def test_one_source_has_no_domains(run: Run, taught: Path, cycles: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    data = {"data": str(cycles), "windows": 24, "length": 24, "general": 0.0}
    path.write_text(json.dumps({"calibration": data, "steps": [{"recover": OPTIONS}]}))
    made = run("compile", taught, path, "-o", tmp_path / "slim")
    assert made.code == 1
    assert "the data has no domains" in made.err


@pytest.mark.parametrize(
    ("domains", "told"),
    [
        ({"rules": "paper"}, "domains"),
        ({"rule": "mine"}, "paper"),
        ({"held_out": 1}, "domains"),
        ({"exhausted": "never"}, "repeat"),
        ({"reference": 3}, "no reference losses"),
        ({"floor": -1}, "domains"),
    ],
)
def test_options_that_mean_nothing(domains: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe.parse({"steps": [{"recover": {"steps": 2, "domains": domains}}]})
