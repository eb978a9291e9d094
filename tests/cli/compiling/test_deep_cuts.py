"""A language model that loses more than half of a role is trained a little, unless it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graphprune as gp
from cli.helpers import Result
from graphprune.pipeline import choices

Run = Callable[..., Result]

KEPT = 24
"""Of 64 channels of each feed-forward block."""


@pytest.fixture(scope="module")
def deep(taught: Path) -> tuple[str, ...]:
    """The flags of a budget that leaves 24 of 64 channels."""
    model = AutoModelForCausalLM.from_pretrained(taught)
    gone = sum(
        p.numel() * (64 - KEPT) // 64 for name, p in model.named_parameters() if ".mlp." in name
    )
    total = sum(p.numel() for p in model.parameters())
    return ("--target", f"params={total - gone}", "--include", "*mlp*")


def few(folder: Path, text: Path, **more: object) -> Path:
    """A recipe's data: some short windows of a text alone."""
    path = folder / "data.json"
    data = {"data": str(text), "windows": 24, "length": 24, "general": 0.0}
    path.write_text(json.dumps({"calibration": data, "seed": 1, **more}))
    return path


def divergence(model: Path, text: Path, dense: Path) -> float:
    """From the dense model's predictions for a text, in nats a token."""
    letters = text.read_text()[:96]
    ids = AutoTokenizer.from_pretrained(dense)(letters, return_tensors="pt").input_ids
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(model)(ids)
        wanted = AutoModelForCausalLM.from_pretrained(dense)(ids).logits.log_softmax(-1)
        logs = found.logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - logs)).sum(-1).mean())


def test_it_is_trained_and_better_for_it(
    run: Run, taught: Path, cycles: Path, deep: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = few(tmp_path, cycles)
    made = {}
    for name, flags in {"plain": ("--effort", "usual"), "trained": ()}.items():
        result = run("compile", taught, recipe, *deep, *flags, "-o", tmp_path / name, "--json")
        assert result.code == 0, result.err
        made[name] = json.loads(result.out)
    assert made["plain"]["trained"] == []
    (trained,) = made["trained"]["trained"]
    assert (trained["figures"]["tokens"], trained["figures"]["steps"]) == (2 * 24 * 24, 12)
    assert made["plain"]["kept"] == made["trained"]["kept"]
    assert any("is to be trained on the 24" in note for note in made["trained"]["notes"])
    assert not any("is to be trained" in note for note in made["plain"]["notes"])
    before, after = (divergence(tmp_path / name, cycles, taught) for name in made)
    assert after < before


def test_where_it_is_left_out(
    taught: Path, cycles: Path, deep: tuple[str, ...], tmp_path: Path
) -> None:
    """Milder budgets, other goals than budgets, and whatever says how weights are changed."""
    base = json.loads(few(tmp_path, cycles).read_text())
    target = {"params": int(deep[1].partition("=")[2])}
    budget = {"target": target, "include": ["*mlp*"]}

    def trains(**more: object) -> bool:
        report = gp.compile(taught, base | more, dry_run=True)
        return any("is to be trained" in note for note in report.notes)

    assert trains(**budget)
    assert not trains(target={"params": 0.9}, include=["*mlp*"])
    assert not trains(remove={"ffn": 0.75})
    assert not trains(**budget, score="taylor")
    assert not trains(**budget, effort="fast")
    assert not trains(**budget, effort="usual")


def test_without_the_engine_it_is_said(
    taught: Path, cycles: Path, deep: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(choices, "find_spec", lambda name: None)
    recipe = json.loads(few(tmp_path, cycles).read_text())
    recipe |= {"target": {"params": int(deep[1].partition("=")[2])}, "include": ["*mlp*"]}
    report = gp.compile(taught, recipe, dry_run=True)
    assert any("pip install 'graphprune[train]'" in note for note in report.notes)
    assert not any("is to be trained" in note for note in report.notes)


def test_a_model_that_makes_no_sense_of_its_data_is_not_trained(
    dense: Path, deep: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = {"target": {"params": 0.7}, "include": ["*mlp*"], "calibration": {"windows": 8}}
    report = gp.compile(dense, recipe, tmp_path / "slim")
    assert not report.trained
    (note,) = [note for note in report.notes if "makes no sense" in note]
    assert note.endswith("units are ranked by taylor, and nothing refitted or trained")
