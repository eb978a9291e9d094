"""What can't be measured costs nothing but its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import graphprune as gp
from graphprune.calibration.sources.section import Calibration
from graphprune.errors import EvaluationError, LoadError
from graphprune.frontends import load_traced
from graphprune.measure import measuring
from graphprune.measure.measuring import Measured, measure_quality
from graphprune.quality.attempts import attempted
from graphprune.quality.perplexity import NoPerplexityError
from quality.helpers import greedily, save_model, save_text


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "dense", num_hidden_layers=1)


@pytest.fixture(scope="module")
def program(dense: Path) -> gp.Program:
    return load_traced(str(dense))


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def test_the_output_is_written_all_the_same(
    program: gp.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    save_text(tmp_path / "a.txt", 300, 0)
    error = RuntimeError("can't allocate memory: you tried to allocate 4 GB")
    for place in ("torch_latencies", "onnx_latencies"):
        monkeypatch.setattr(f"graphprune.quality.perplexity.{place}", failing(error))
    for place in ("compare", "complete"):
        monkeypatch.setattr(f"graphprune.measure.measuring.{place}", failing(error))
    recipe = {
        "remove": {"ffn": 0.5},
        "score": "magnitude",
        "calibration": {"text": str(tmp_path / "a.txt"), "windows": 2, "length": 16},
    }
    report = gp.compile(program, recipe, tmp_path / "slim", formats=["pt2", "onnx"])
    whats = ("quality on", "quality on builtin", "completions", "latency in PyTorch",
             "latency in ONNX Runtime")  # fmt: skip
    assert len(report.notes) == len(whats)
    for what in whats:
        assert any(n.startswith(what) and " not measured: " in n for n in report.notes)
    data = json.loads((tmp_path / "slim" / "report.json").read_text())
    assert data["run"]["latency"]["after"]["torch"] is None
    assert data["after"]["perplexities"] == {}
    assert data["quality"] is None
    for file in ("model.pt2", "model.onnx", "graphprune_plan.json"):
        assert (tmp_path / "slim" / file).stat().st_size > 0
    report.render()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("no\nroom"), "RuntimeError: no room"),
        (MemoryError(), "there is not enough memory"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (IndexError("index out of range in self"), "IndexError: index out of range in self"),
        (LoadError("it can't be opened", why="it is new"), "it can't be opened (it is new)"),
    ],
)
def test_what_may_go_wrong_is_a_note(error: Exception, why: str) -> None:
    notes: list[str] = []
    with attempted("latency", notes):
        raise error
    assert notes == [f"latency not measured: {why}"]
    with pytest.raises(EvaluationError, match="latency can't be measured") as caught:  # noqa: SIM117
        with attempted("latency", notes, needed=True):
            raise error
    assert caught.value.why == why


def test_our_own_mistakes_are_not_hidden() -> None:
    with pytest.raises(KeyError), attempted("a number", []):
        raise KeyError("a bug")
    with pytest.raises(KeyboardInterrupt), attempted("a number", []):
        raise KeyboardInterrupt


def test_an_onnx_file_that_cannot_be_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    vision = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)
    ).eval()
    torch.onnx.export(vision, (torch.zeros(1, 3, 8, 8),), tmp_path / "a.onnx", dynamo=True)
    monkeypatch.setattr(
        "graphprune.quality.perplexity.onnx_latencies", failing(RuntimeError("no time"))
    )
    recipe = {"remove": {"channels": 0.5}}
    report = gp.compile(tmp_path / "a.onnx", recipe, tmp_path / "slim.onnx")
    assert "latency in ONNX Runtime not measured: RuntimeError: no time" in report.notes
    assert (tmp_path / "slim.onnx").stat().st_size > 0


def test_prompts_that_cannot_be_continued_are_a_note(
    program: gp.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = failing(ValueError("`pad_token_id` should be positive"))
    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", broken)
    found = measured(program)
    assert found.notes == (
        "completions not measured: ValueError: `pad_token_id` should be positive",
    )
    assert list(found.pairs) == ["builtin", "help"]
    assert found.completions == ()


def test_a_model_that_looks_ahead_has_one_note(
    program: gp.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = NoPerplexityError("the model has no perplexity", why="its logits depend on later ones")
    monkeypatch.setattr("graphprune.measure.measuring.compare", failing(error))
    found = measured(program)
    assert found.notes == ("no perplexity: its logits depend on later ones",)
    assert found.quality is None


def test_a_prompt_is_continued_as_far_as_the_model_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a plain loop where the module is a graph, which has no method for it."""
    monkeypatch.setattr(measuring, "TOKENS", 24)
    program = load_traced(str(save_model(tmp_path / "m", max_position_embeddings=24)))
    graph = program.exported.module()
    found = measured(program, graph)
    assert found.notes == ()
    (one,) = found.completions  # the other prompt alone is too long
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    new = greedily(tmp_path / "m", one.prompt, 24 - 1 - len(one.prompt))
    assert one.dense == one.slim == tokenizer.decode(new, skip_special_tokens=True)


def measured(program: gp.Program, slim: Any = None) -> Measured:
    assert program.module is not None
    models = (program.module, slim or program.module)
    wanted = Calibration(windows=2, length=16)
    return measure_quality(program, models, wanted, 0, lambda stage: None)
