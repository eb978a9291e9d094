"""Choosing by surgery and repairing weights, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import graphprune as gp
from cli.helpers import Result, check_failure
from graphprune.calibration.calibrate import calibration_samples
from graphprune.calibration.sources.amounts import REPAIRS
from graphprune.passes.repair.structured import obs
from graphprune.recipe.recipe import Recipe

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, cycles: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        f"remove: {{ffn: 0.5, kv_heads: 1/3}}\ncalibration: {{data: '{cycles}', general: 0, "
        "windows: 40, length: 32}\n"
    )
    return path


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def test_a_language_model_is_operated_on_by_default(
    run: Run, taught: Path, recipe: Path, tmp_path: Path
) -> None:
    result = run("compile", taught, recipe, "-o", tmp_path / "slim", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["score"] == "obs"
    names = [one["parameter"] for one in report["refits"]["layers"]]
    assert [n.rpartition("layers.")[2] for n in names] == [
        f"{layer}.{part}.weight"
        for layer in range(3)
        for part in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert all(one["error"] < one["before"] for one in report["refits"]["layers"])
    assert "choosing units: 6 of 6" in result.err
    assert "repairing weights" not in result.err

    # The same by hand.
    program = gp.load(taught)
    settled = Recipe.load(recipe)
    samples = calibration_samples(program, settled.calibration, 0, REPAIRS).data
    counts = gp.select(program, remove=settled.remove, score="random")
    keep = {name: len(units) for name, units in counts.kept_units.items()}
    found = obs(program, samples, keep)
    plan = found.plan
    assert gp.Plan.load(tmp_path / "slim" / "graphprune_plan.json").kept_units == plan.kept_units
    slim = gp.apply(found.program, plan).module
    tokens = torch.arange(30)[None]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    torch.testing.assert_close(logits(written, tokens), logits(slim, tokens))
    # And it is worth it.
    whole = AutoModelForCausalLM.from_pretrained(taught)
    plain = gp.apply(program, plan).module
    far = [
        float((logits(m, samples) - logits(whole, samples)).square().mean())
        for m in (written, plain)
    ]
    assert far[0] < far[1]


def test_roles_that_no_weight_reads_are_left_to_other_scores(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    flags = ["--remove", "ffn=0.25", "--remove", "layers=1/3", "--data", cycles]
    result = run("compile", taught, "-o", output, *flags)
    assert result.code == 0, result.err
    report = json.loads((output / "report.json").read_text())
    assert report["kept"]["layers"] == [2, 3]
    removed = {e["parameter"]: e["removed"] for e in report["refits"]["layers"]}
    assert list(removed.values()) == [16, 16]
    names = [n.rpartition(".layers.")[2] for n in removed]
    assert names == ["0.mlp.down_proj.weight", "1.mlp.down_proj.weight"]
    check_failure(
        run("compile", taught, "-o", tmp_path / "no", *flags, "--score", "obs"),
        "nothing with role 'layers' can be judged by the score", "block-influence",
    )  # fmt: skip


def test_a_repair_goes_with_any_score(run: Run, taught: Path, cycles: Path, tmp_path: Path) -> None:
    errors = {}
    goal = ("--remove", "ffn=0.5", "--remove", "kv_heads=1/3", "--score", "magnitude")
    for repair, data in {"none": "--text", "reconstruct": "--data"}.items():
        output = tmp_path / repair
        result = run("compile", taught, "-o", output, *goal, "--repair", repair, data, cycles)
        assert result.code == 0, result.err
        report = json.loads((output / "report.json").read_text())
        assert report["score"] == "magnitude"
        errors[repair] = report["after"]["perplexity"]["value"], report["refits"]
    assert errors["none"][1] is None
    assert len(errors["reconstruct"][1]["layers"]) == 6
    plans = [gp.Plan.load(tmp_path / r / "graphprune_plan.json") for r in ("none", "reconstruct")]
    assert plans[0] == plans[1]


def test_biases_are_added_where_the_configuration_can_hold_them(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    result = run(
        "compile", taught, "-o", output, "--remove", "ffn=0.25", "--data", cycles,
        "--score", "flap", "--repair", "bias",
    )  # fmt: skip
    assert result.code == 0, result.err
    slim = AutoModelForCausalLM.from_pretrained(output)
    assert slim.config.mlp_bias
    assert not slim.config.attention_bias
    for layer in slim.model.layers:
        assert layer.mlp.down_proj.bias.abs().sum() > 0
        assert not layer.mlp.up_proj.bias.any()
    # The model with biases is traced anew, and has axes of its own.
    report = json.loads((output / "report.json").read_text())
    for side, ffn in (("before", 64), ("after", 48)):
        per_token = 3 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * ffn + 2 * 48 * 128) + 48 * 96
        assert report[side]["macs"] == report["run"]["latency"][side]["torch"]["macs"]
        assert report[side]["macs"] == pytest.approx(128 * per_token, rel=0.002)


def test_a_dry_run_reads_no_data(run: Run, taught: Path) -> None:
    result = run("compile", taught, "--remove", "ffn=0.5", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["kept"] == {"ffn": [96, 192]}
    assert "calibration" not in result.err


def test_a_model_that_knows_no_text_is_not_operated_on(
    run: Run, dense: Path, text: Path, tmp_path: Path
) -> None:
    """With our own text it falls back and says so; who gives a text has asked for it."""
    result = run("compile", dense, "-o", tmp_path / "slim", "--remove", "ffn=0.5")
    assert result.code == 0, result.err
    assert "scored by taylor" in result.out
    assert "makes no sense of the calibration text" in result.out
    assert "no layer refitted" in result.out
    goal = ("--remove", "ffn=0.5", "--data", text)
    asked: tuple[tuple[str, ...], ...] = (
        (),
        ("--score", "obs"),
        ("--repair", "reconstruct"),
        ("--score", "magnitude", "--repair", "reconstruct"),
    )
    for flags in asked:
        refused = run("compile", dense, "-o", tmp_path / "no", *goal, *flags)
        check_failure(refused, "makes no sense of the calibration text")
        assert ("--score taylor" in refused.err) == (flags == ())


def changed(path: Path, name: str) -> None:
    weights = load_file(path / "model.safetensors")
    weights[name][0, 0] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--score", "flap", "--repair", "bias"), marks=pytest.mark.slow),
        pytest.param(("--sparsify", "wanda", "--sparsity", "30%"), marks=pytest.mark.slow),
    ],
    ids=["default", "bias", "masks"],
)
def test_what_was_refitted_is_verified_from_the_files(
    run: Run, taught: Path, cycles: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    output = tmp_path / "slim"
    formats = [f"--format={f}" for f in ("hf", "pt2", "onnx")]
    result = run(
        "compile", taught, "-o", output, "--remove", "ffn=0.25", "--data", cycles, *formats, *flags
    )
    assert result.code == 0, result.err
    checked = run("verify", output, "--json")
    assert checked.code == 0, checked.err
    assert len(json.loads(checked.out)) == 3
    # A plan in terms of what was read can be replayed on it.
    again = run("compile", taught, "--plan", output / "graphprune_plan.json", "--dry-run", "--json")
    assert again.code == 0, again.err
    # What nobody refitted or masked still has to be the dense model's.
    masked = "--sparsify" in flags
    changed(output, f"model.{'embed_tokens' if masked else 'layers.0.mlp.up_proj'}.weight")
    broken = run("verify", output)
    assert broken.code == 1


def test_a_dry_run_counts_what_a_global_ranking_keeps(
    run: Run, taught: Path, cycles: Path, tmp_path: Path
) -> None:
    goal = ("--remove", "ffn=0.5", "--global", "--text", cycles)
    kept = []
    for where in (("--dry-run",), ("-o", tmp_path / "slim", "--format", "pt2")):
        result = run("compile", taught, *goal, *where, "--json")
        assert result.code == 0, result.err
        kept.append(json.loads(result.out)["after"]["parameters"])
    assert kept[0] == kept[1]
