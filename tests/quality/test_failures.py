"""What can't be measured costs nothing but its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune as gp
from graphprune.errors import EvaluationError, LoadError
from graphprune.evaluate import NoPerplexityError
from graphprune.quality.attempts import attempted
from quality.helpers import save_model, save_text


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "dense", num_hidden_layers=1)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


ERRORS = [
    RuntimeError("can't allocate memory: you tried to allocate 4 GB"),
    MemoryError(),
    OSError(28, "No space left on device"),
    LoadError("ONNX Runtime can't open the file", why="it is new"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_output_is_written_all_the_same(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save_text(tmp_path / "a.txt", 300, 0)
    for place in ("evaluate.torch_latencies", "evaluate.onnx_latencies"):
        monkeypatch.setattr(f"graphprune.{place}", failing(error))
    for place in ("compare", "complete"):
        monkeypatch.setattr(f"graphprune.quality.measuring.{place}", failing(error))
    recipe = {
        "remove": {"ffn": 0.5},
        "score": "magnitude",
        "calibration": {"text": str(tmp_path / "a.txt"), "windows": 2, "length": 16},
    }
    report = gp.compile(dense, recipe, tmp_path / "slim", formats=["pt2", "onnx"])
    whats = ("quality on", "quality on builtin", "completions", "latency in PyTorch",
             "latency in ONNX Runtime")  # fmt: skip
    assert len(report.notes) == len(whats)
    for what in whats:
        assert any(n.startswith(what) and " not measured: " in n for n in report.notes)
    data = json.loads((tmp_path / "slim" / "report.json").read_text())
    assert data["after"]["torch"] is None
    assert data["after"]["perplexities"] == {}
    assert data["quality"] is None
    for file in ("model.pt2", "model.onnx", "graphprune_plan.json"):
        assert (tmp_path / "slim" / file).stat().st_size > 0
    report.render()


def test_our_own_mistakes_are_not_hidden() -> None:
    with pytest.raises(KeyError), attempted("a number", []):
        raise KeyError("a bug")
    with pytest.raises(KeyboardInterrupt), attempted("a number", []):
        raise KeyboardInterrupt
    with pytest.raises(EvaluationError, match="latency can't be measured"):  # noqa: SIM117
        with attempted("latency", [], needed=True):
            raise RuntimeError("no")


def test_an_onnx_file_that_cannot_be_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    vision = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)
    ).eval()
    torch.onnx.export(vision, (torch.zeros(1, 3, 8, 8),), tmp_path / "a.onnx", dynamo=True)
    monkeypatch.setattr("graphprune.evaluate.onnx_latencies", failing(RuntimeError("no time")))
    recipe = {"remove": {"channels": 0.5}}
    report = gp.compile(tmp_path / "a.onnx", recipe, tmp_path / "slim.onnx")
    assert "latency in ONNX Runtime not measured: RuntimeError: no time" in report.notes
    assert (tmp_path / "slim.onnx").stat().st_size > 0


def test_prompts_that_cannot_be_continued_are_a_note(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = failing(ValueError("`pad_token_id` should be positive"))
    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", broken)
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude",
              "calibration": {"windows": 2, "length": 16}}  # fmt: skip
    report = gp.compile(dense, recipe, tmp_path / "slim")
    (note,) = [note for note in report.notes if "completions" in note]
    assert note == "completions not measured: ValueError: `pad_token_id` should be positive"
    assert report.quality is not None
    assert list(report.quality.texts) == ["builtin", "help"]
    assert report.quality.completions == ()


def test_a_model_that_looks_ahead_has_one_note(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = NoPerplexityError("the model has no perplexity", why="its logits depend on later ones")
    monkeypatch.setattr("graphprune.quality.measuring.compare", failing(error))
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude"}
    report = gp.compile(dense, recipe, tmp_path / "slim")
    assert report.notes == ("no perplexity: its logits depend on later ones",)
    assert report.quality is None
