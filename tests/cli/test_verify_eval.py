"""`graphprune verify` and `graphprune eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli.helpers import LETTERS, Result, check_failure, damaged


def test_verify_from_the_files(run: Callable[..., Result], compiled: Path, dense: Path) -> None:
    for flags in ((), ("--source", dense)):
        result = run("verify", compiled, *flags, "--json")
        assert result.code == 0, result.err
        errors = json.loads(result.out)
        assert errors.keys() == {"slim", "model.pt2", "model.onnx"}
        assert errors["slim"] < 1e-9
        assert errors["model.pt2"] < 1e-9
        assert errors["model.onnx"] < 1e-3


def test_verify_notices_another_weight(
    run: Callable[..., Result], compiled: Path, tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01

    output = damaged(compiled, tmp_path, change)
    check_failure(run("verify", output), "does not compute")


def test_verify_without_what_it_needs(
    run: Callable[..., Result], dense: Path, compiled: Path, tmp_path: Path
) -> None:
    check_failure(run("verify", tmp_path / "none"), "no such output")
    check_failure(run("verify", dense), "plan")
    check_failure(run("verify", tmp_path), "holds no model")
    check_failure(run("verify", compiled, "--source", compiled), "doesn't belong")


def test_eval_equals_a_plain_computation(
    run: Callable[..., Result], dense: Path, compiled: Path, text: Path
) -> None:
    flags = ("--text", text, "--length", 32, "--windows", 5, "--json")
    result = run("eval", compiled, "--against", dense, *flags)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    ids = [LETTERS.index(letter) for letter in text.read_text()[: 5 * 32]]
    windows = torch.tensor(ids).view(5, 32)
    for path in (dense, compiled):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        with torch.no_grad():
            loss = model(input_ids=windows, labels=windows).loss.item()
        found = data[str(path)]
        assert found["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found["perplexity"]["windows"] == 5
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
        weights = load_file(path / "model.safetensors").values()
        assert found["bytes"] == sum(w.numel() * w.element_size() for w in weights)
        assert found["files"] == (path / "model.safetensors").stat().st_size


def test_eval_prints_a_table(run: Callable[..., Result], dense: Path, text: Path) -> None:
    result = run("eval", dense, "--text", text, "--length", 16, "--windows", 3)
    assert result.code == 0, result.err
    assert "perplexity on" in result.out
    assert "3 x 16" in result.out
    assert "change" not in result.out


def test_eval_of_an_onnx_file(run: Callable[..., Result], compiled: Path) -> None:
    result = run("eval", compiled / "model.onnx", "--json")
    assert result.code == 0, result.err
    (found,) = json.loads(result.out).values()
    assert found["onnxruntime"]["seconds"] > 0
    assert found["files"] == (compiled / "model.onnx").stat().st_size
    report = json.loads((compiled / "report.json").read_text())["after"]
    assert found["macs"] == report["macs"] > 0
    assert found["inputs"] == report["inputs"] == {"input_ids": [1, 128]}


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"short", "too short"), (b"\xff\xfe", "not UTF-8")]
)
def test_eval_on_text_that_is_none(
    run: Callable[..., Result], dense: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    check_failure(run("eval", dense, "--text", path), message)
