"""`graphprune compile --dry-run`: what it says against what the real run then does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cli.helpers import Result, check_failure, tree

Run = Callable[..., Result]


def sizes(forecast: dict) -> set[tuple[str, int, int, int]]:
    return {(s["role"], len(s["structures"]), s["before"], s["after"]) for s in forecast["sizes"]}


def test_sizes_by_role_and_layer(run: Run, dense: Path, tmp_path: Path) -> None:
    flags = (
        *("--remove", "ffn=0.5", "--remove", "model.layers.2.*/ffn=0.25"),
        *("--remove", "heads=1/3", "--score", "magnitude"),
    )
    dry = json.loads(run("compile", dense, *flags, "--dry-run", "--json").out)
    assert sizes(dry["forecast"]) == {("ffn", 2, 64, 32), ("ffn", 1, 64, 48), ("kv_heads", 3, 3, 2)}
    assert dry["forecast"]["form"] == "self-contained"
    shown = run("compile", dense, *flags, "--dry-run").out
    assert "model.layers.{0..1}.mlp.gate_proj.weight:0" in shown
    assert "writes: hf (self-contained)" in shown
    assert "data: none is needed" in shown
    output = tmp_path / "slim.pt2"
    real = run("compile", dense, *flags, "-o", output, "--json")
    assert real.code == 0, real.err
    report = json.loads(real.out)
    assert report["forecast"] is None
    for name in ("parameters", "macs", "bytes", "input", "inputs"):
        assert report["after"][name] == dry["after"][name]
    assert report["kept"] == dry["kept"]
    weights = torch.export.load(output).state_dict
    kept = [len(weights[f"model.layers.{i}.mlp.up_proj.weight"]) for i in range(3)]
    assert kept == [32, 32, 48]


def test_a_budget_with_a_named_alignment(run: Run, dense: Path) -> None:
    flags = ("--target", "params=0.9", "--align", "ffn=ort", "--dry-run", "--json")
    result = run("compile", dense, *flags)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert {s["after"] % 16 for s in found["forecast"]["sizes"] if s["role"] == "ffn"} <= {0}
    assert found["after"]["parameters"] <= 0.9 * found["before"]["parameters"]


def test_data_and_passes(run: Run, taught: Path, cycles: Path) -> None:
    flags = ("--remove", "ffn=0.5", "--data", cycles, "--dry-run")
    shown = run("compile", taught, *flags, "--repair", "reconstruct").out
    data = f"data: {cycles} (55% general text), up to 128 samples of 256 tokens"
    assert data in " ".join(shown.split())
    passes = "choose units by obs, and refit what reads them; repair 3 layers by reconstruct; cut"
    assert f"passes: {passes}; verify; write; measure" in shown
    assert "takes about" in shown
    found = json.loads(run("compile", taught, *flags, "--json").out)["forecast"]
    assert 0 < found["seconds"] < 3600
    weights = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(taught).parameters())
    assert weights < found["memory"] < 1 << 30


def test_zeros(run: Run, taught: Path, cycles: Path, tmp_path: Path) -> None:
    flags = (
        *("--remove", "ffn=0.5", "--score", "random", "--data", cycles),
        *("--sparsify", "wanda", "--pattern", "1:4"),
    )
    dry = json.loads(run("compile", taught, *flags, "--dry-run", "--json").out)["forecast"]
    output = tmp_path / "slim.pt2"
    result = run("compile", taught, *flags, "-o", output)
    assert result.code == 0, result.err
    weights = torch.export.load(output).state_dict
    linears = [w for n, w in weights.items() if n.endswith("proj.weight")]
    assert dry["zeros_of"] == sum(w.numel() for w in linears)
    assert dry["zeros"] == sum(int((w == 0).sum()) for w in linears)
    assert "wanda" in " ".join(dry["passes"])


def test_what_is_refused_is_refused(run: Run, dense: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    dry = ("compile", dense, "--dry-run", "--text", text)
    goal = ("--remove", "ffn=0.5")
    check_failure(run(*dry, *goal, "-o", tmp_path / "taken"), "the output exists")
    check_failure(run(*dry, "--target", "params=0.01"), "not reachable")
    check_failure(run(*dry, "--shape", "ffn=65"), "not reachable")
    check_failure(
        run(*dry, "--remove", "qk_dim=0.5", "--score", "obs"), "can be judged by the score"
    )
    check_failure(run(*dry, *goal, "--align", "gpuu"), "did you mean 'gpu'")
    assert tree(tmp_path) == ["taken", "taken/file"]


def test_layers_that_are_alike_need_no_scores(run: Run, dense: Path) -> None:
    result = run("compile", dense, "--remove", "layers=1/3", "--dry-run", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert sizes(found["forecast"]) == {("layers", 1, 3, 2)}
    assert "calibration" not in result.err
    linear = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 64
    gone = linear + 2 * 48
    assert found["before"]["parameters"] - found["after"]["parameters"] == gone


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_the_format_is_that_of_the_output(
    run: Run, dense: Path, tmp_path: Path, suffix: str
) -> None:
    flags = ("-o", tmp_path / f"slim.{suffix}", "--remove", "ffn=0.5", "--dry-run", "--json")
    found = json.loads(run("compile", dense, *flags).out)["forecast"]
    assert (found["formats"], found["form"]) == ([suffix], None)
    assert tree(tmp_path) == []
