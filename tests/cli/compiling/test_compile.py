"""`graphprune compile`: what it prints and what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import graphprune.pipeline.compiler
from cli.helpers import LETTERS, Result, tree


def test_compile_writes_all_formats_and_nothing_else(compiled: Path) -> None:
    written = set(tree(compiled))
    assert written >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "model.onnx",
        "model.pt2",
        "graphprune_plan.json",
        "recipe.yaml",
        "report.html",
        "report.json",
    }
    assert tree(compiled.parent) == ["slim", *sorted(f"slim/{name}" for name in written)]
    model = AutoModelForCausalLM.from_pretrained(compiled)
    assert model.config.intermediate_size == 48
    assert model.config.num_key_value_heads == 2


def test_the_report_says_what_the_files_are(compiled: Path, dense: Path) -> None:
    report = json.loads((compiled / "report.json").read_text())
    slim = AutoModelForCausalLM.from_pretrained(compiled)
    assert (
        report["before"]["parameters"]
        == 96 * 48 + 3 * (4 * 48 * 48 - 2 * 48 * 24 + 3 * 48 * 64 + 2 * 48) + 48
    )
    assert report["after"]["parameters"] == sum(p.numel() for p in slim.parameters())
    assert report["after"]["bytes"] == 4 * report["after"]["parameters"]
    assert report["kept"] == {"ffn": [144, 192], "kv_heads": [6, 9]}
    assert report["native"] is True
    assert report["source"] == str(dense)
    assert 0 <= report["max_abs_error"] < 1e-9
    for side in ("before", "after"):
        assert report["run"]["latency"][side]["torch"]["seconds"] > 0
        assert report["run"]["latency"][side]["onnxruntime"]["seconds"] > 0
        assert report[side]["perplexity"]["windows"] == 8


def test_compile_prints_a_table(
    run: Callable[..., Result], dense: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "slim.pt2"
    flags = ("--remove", "ffn=0.5", "--score", "taylor", "--text", text)
    result = run("compile", dense, "-o", output, *flags)
    assert result.code == 0, result.err
    for words in ("parameters", "-25.9 %", "PyTorch, ms", "perplexity", f"written: {output}"):
        assert words in result.out
    assert "verifying ..." in result.err
    assert tree(output.parent) == [
        "slim.pt2",
        "slim.pt2.graphprune_plan.json",
        "slim.pt2.recipe.yaml",
        "slim.pt2.report.html",
        "slim.pt2.report.json",
    ]
    assert run("verify", output).code == 0


def test_json_is_nothing_but_json_and_a_dry_run_writes_nothing(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    result = run("compile", dense, "-o", output, "--target", "params=36912", "--dry-run", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["run"]["outputs"] == []
    assert report["after"]["parameters"] == 36_912
    assert tree(tmp_path) == []


def test_a_saved_plan_replays_to_the_same_bytes(
    run: Callable[..., Result], dense: Path, compiled: Path, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    plan = compiled / "graphprune_plan.json"
    result = run("compile", dense, "-o", output, "--plan", plan)
    assert result.code == 0, result.err
    again = (output / "model.safetensors").read_bytes()
    assert again == (compiled / "model.safetensors").read_bytes()


def test_a_recipe_with_flags(run: Callable[..., Result], dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("shape: {ffn: 32, kv_heads: 2}\nscore: random\n")
    found = run("compile", dense, recipe, "--dry-run", "--json", "--seed", 1)
    assert json.loads(found.out)["kept"] == {"ffn": [96, 192], "kv_heads": [6, 9]}
    flags = ("--shape", "ffn=48", "--exclude", "model.layers.0.*")
    found = run("compile", dense, recipe, "--dry-run", "--json", *flags)
    assert json.loads(found.out)["kept"] == {"ffn": [64 + 2 * 48, 192]}


def test_selectors_choose_layers_and_dimensions(run: Callable[..., Result], dense: Path) -> None:
    chosen = ("--remove", "ffn=0.25", "--remove", "model.layers.[12].*/ffn=0.5")
    found = run("compile", dense, "--dry-run", "--json", *chosen)
    assert json.loads(found.out)["kept"] == {"ffn": [48 + 2 * 32, 192]}
    kept_whole = ("--exclude", "model.layers.2.mlp.up_proj.weight:0")
    found = run("compile", dense, "--dry-run", "--json", *chosen, *kept_whole)
    assert json.loads(found.out)["kept"] == {"ffn": [48 + 32 + 64, 192]}
    flags = ("--remove", "ffn=0.5", "--include", "model.layers.1.*")
    found = run("compile", dense, "--dry-run", "--json", *flags)
    assert json.loads(found.out)["kept"] == {"ffn": [64 + 32 + 64, 192]}


def test_rounds_reach_the_same_size(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("remove: {ffn: 0.5, layers: 1/3}\nrounds: 2\n")
    result = run("compile", dense, recipe, "--dry-run", "--json")
    assert result.code == 0, result.err
    kept = json.loads(result.out)["kept"]
    assert kept["layers"] == [2, 3]
    assert kept["ffn"] == [2 * 32, 192]


@pytest.mark.parametrize(
    ("flags", "score"), [((), "obs"), (("--score", "taylor"), "taylor")], ids=["auto", "taylor"]
)
def test_language_models_are_scored_on_text(
    run: Callable[..., Result], dense: Path, text: Path, flags: tuple[str, ...], score: str
) -> None:
    """structured.md, section 3, 58: calibrated criteria are the default."""
    goal = ("--remove", "ffn=0.5", "--text", text, "--dry-run")
    result = run("compile", dense, *goal, *flags)
    assert result.code == 0, result.err
    assert ("reading calibration data" in result.err) == (score == "taylor")
    assert f"scored by {score}" in result.out


def test_a_language_model_without_a_tokenizer_is_not_ranked_by_magnitude_unasked(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(dense / name, mute / name)
    goal = ("compile", mute, "--remove", "ffn=0.5", "--dry-run")
    result = run(*goal)
    assert result.code == 1
    for way in ("save the tokenizer", "calibration.tokenizer", "token ids", "--score magnitude"):
        assert way in result.err
    assert "loading" not in result.err
    result = run(*goal, "--score", "magnitude")
    assert result.code == 0, result.err
    assert "scored by magnitude" in result.out
    np.save(tmp_path / "ids.npy", np.arange(1024) % 96)
    result = run(*goal, "--data", tmp_path / "ids.npy")
    assert result.code == 0, result.err
    assert "scored by obs" in result.out


def test_a_ruined_language_model_is_said_to_be_one(tmp_path: Path, dense: Path) -> None:
    """structured.md, section 3, 58: warn that the result is unusable."""
    letters = [LETTERS[7 * i % len(LETTERS)] for i in range(512)]
    texts = [tmp_path / "text.txt", tmp_path / "copy.txt"]
    for text in texts:
        text.write_text("".join(letters))
    taught = tmp_path / "taught"
    shutil.copytree(dense, taught)
    model = AutoModelForCausalLM.from_pretrained(dense)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    ids = torch.tensor([[LETTERS.index(letter) for letter in letters[:250]]])
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(taught)
    for fraction, ruined in ((0.9, True), (0.02, False)):
        recipe = {
            "remove": {"ffn": fraction},
            "score": "random",
            "calibration": {"text": list(map(str, texts)), "windows": 4, "length": 32},
        }
        report = graphprune.pipeline.compiler.compile(
            str(taught), recipe, tmp_path / f"without {fraction}"
        )
        dense_text, slim_text = report.before.perplexity, report.after.perplexity
        assert dense_text is not None
        assert slim_text is not None
        assert (slim_text.value > 1.5 * dense_text.value) == ruined
        assert any("remove less" in note for note in report.notes) == ruined


def test_overwriting_ones_own_output(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    output.mkdir()
    for name in ("graphprune_plan.json", "model.onnx"):
        (output / name).write_text("old")
    flags = ("--remove", "ffn=0.5", "--format", "pt2", "-o", output, "--overwrite")
    result = run("compile", dense, *flags)
    assert result.code == 0, result.err
    assert tree(tmp_path) == [
        "slim",
        "slim/graphprune_plan.json",
        "slim/model.pt2",
        "slim/recipe.yaml",
        "slim/report.html",
        "slim/report.json",
    ]


def test_the_recipe_makes_the_same_weights_again(
    run: Callable[..., Result], dense: Path, compiled: Path, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    result = run("compile", dense, compiled / "recipe.yaml", "-o", output, "--format", "hf")
    assert result.code == 0, result.err
    for name in ("model.safetensors", "config.json", "graphprune_plan.json"):
        assert (output / name).read_bytes() == (compiled / name).read_bytes(), name
