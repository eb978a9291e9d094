"""Measurements against independent computations."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from graphprune.errors import EvaluationError, LoadError
from graphprune.ir.onnx.ort import example_feeds, onnx_session
from graphprune.quality import perplexity as evaluate
from graphprune.quality import timing


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model


def tokens(count: int, length: int, vocabulary: int = 97) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (count, length), generator=generator)


def uniform(vocabulary: int) -> Callable[..., torch.Tensor]:
    return lambda input_ids: torch.full((*input_ids.shape, vocabulary), 3.0)


def test_perplexity_equals_a_plain_float64_computation(llama: LlamaForCausalLM) -> None:
    ids = tokens(150, 9)  # more than one batch
    measured = evaluate.perplexity(llama, ids)
    with torch.no_grad():
        logits = llama(input_ids=ids).logits.double().numpy()
    losses = np.zeros(150)
    for window in range(150):
        for position in range(8):
            row = logits[window, position]
            shifted = row - row.max()
            loss = math.log(np.exp(shifted).sum()) - shifted[ids[window, position + 1]]
            losses[window] += loss / 8
    assert measured.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert measured.losses == pytest.approx(losses, rel=1e-5)
    assert (measured.windows, measured.length, measured.vocabulary) == (150, 9, 97)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    measured = evaluate.perplexity(uniform(1000), tokens(3, 20))
    assert measured.value == pytest.approx(1000)


def test_perplexity_of_a_model_that_knows_everything_is_one() -> None:
    def successor(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=50.0 * torch.nn.functional.one_hot(input_ids + 1, 98))

    measured = evaluate.perplexity(successor, torch.arange(12).view(2, 6))
    assert measured.value == pytest.approx(1)
    assert measured.meaningful


def test_a_model_worse_than_guessing_is_flagged() -> None:
    def wrong(input_ids: torch.Tensor) -> torch.Tensor:
        return -5.0 * torch.nn.functional.one_hot(input_ids + 1, 98)

    assert not evaluate.perplexity(wrong, torch.arange(12).view(2, 6)).meaningful


def test_a_model_that_looks_ahead_has_no_perplexity() -> None:
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        initializer_range=0.5,
    )
    with pytest.raises(EvaluationError, match="not a causal language model"):
        evaluate.perplexity(BertForMaskedLM(config), tokens(2, 6))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda input_ids: torch.zeros(len(input_ids), 97), "not logits for every token"),
        (lambda input_ids: {"loss": 1}, "it returns dict, not logits"),
        (uniform(50), "outside its vocabulary of 50"),
        (lambda input_ids: torch.full((*input_ids.shape, 97), math.nan), "NaN or infinite"),
    ],
)
def test_nonsense_is_an_error(model: Callable[..., object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate.perplexity(model, tokens(4, 9))


@pytest.mark.parametrize("token", [97, -1])
def test_a_token_of_another_vocabulary_is_found_in_any_window(token: int) -> None:
    table = torch.nn.Embedding(97, 97)
    windows = tokens(4, 9)
    windows[3, 5] = token
    with pytest.raises(EvaluationError, match=f"token {token} is outside its vocabulary of 97"):
        evaluate.perplexity(lambda input_ids: table(input_ids), windows)


@pytest.mark.parametrize("shape", [(0, 8), (4, 1)])
def test_too_few_tokens(shape: tuple[int, int]) -> None:
    with pytest.raises(EvaluationError, match="at least one window of two tokens"):
        evaluate.perplexity(uniform(97), torch.zeros(shape, dtype=torch.long))


def test_latency_is_a_median_that_ignores_the_warm_up() -> None:
    pauses = iter([0.2, 0.02, 0.02, 0.3, 0.02, 0.02])
    (latency,) = evaluate.torch_latencies([lambda: time.sleep(next(pauses))], repeats=5)
    assert 20 <= latency.milliseconds < 100
    assert latency.milliseconds == latency.seconds * 1000
    assert 0.02 <= latency.quartiles[0] <= latency.seconds <= latency.quartiles[1]
    assert (latency.repeats, latency.runtime) == (5, "torch")
    assert latency.threads == torch.get_num_threads()


def test_a_slow_model_gets_three_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS_TOO_MUCH", 0.001)
    (latency,) = evaluate.torch_latencies([lambda: time.sleep(0.001)])
    assert latency.repeats == 3


def test_a_fast_model_is_measured_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS_ENOUGH", 0.5)
    calls: list[int] = []
    (latency,) = timing.in_turns([lambda: calls.append(0)], None, 1, "torch")
    assert len(calls) - 1 == latency.repeats == timing.MOST
    monkeypatch.setattr(timing, "SECONDS_ENOUGH", 0.0)
    (latency,) = timing.in_turns([lambda: None], None, 1, "torch")
    assert latency.repeats == timing.USUAL


def test_share_of_the_ideal_speed_up() -> None:
    def took(seconds: float, macs: int | None) -> timing.Latency:
        return timing.Latency(seconds, (seconds, seconds), 9, 1, "torch", macs)

    found = timing.speedup(took(0.3, 4000), took(0.1, 1000))
    assert found is not None
    assert (found.time, found.macs, found.share) == pytest.approx((3, 4, 0.75))
    assert timing.speedup(took(0.3, None), took(0.1, 1000)) is None
    assert timing.speedup(None, took(0.1, 1000)) is None


def test_models_are_measured_in_turns() -> None:
    calls: list[str] = []
    models = [lambda: calls.append("a"), lambda: calls.append("b")]
    assert len(evaluate.torch_latencies(models, repeats=3)) == 2
    assert calls == ["a", "b"] * 4


def test_parameters_count_tied_ones_once(llama: LlamaForCausalLM) -> None:
    embedding = 97 * 32
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert evaluate.parameters(llama) == 2 * embedding + 2 * layer + 32
    tied = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False) for _ in range(2)])
    tied[1].weight = tied[0].weight
    assert evaluate.parameters(tied) == 16


@pytest.fixture
def gemm(tmp_path: Path) -> Path:
    """``mask * (x @ w)`` with a dynamic batch and length, the weight in a file of its own."""
    weight = numpy_helper.from_array(np.ones((8, 3), np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["m", "last"], ["u"]),
            helper.make_node("Mul", ["y", "u"], ["z"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 8]),
            helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "length"]),
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", "length", 3])],
        [weight, numpy_helper.from_array(np.array([2]), "last")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save_model(
        model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64
    )
    return path


def test_onnx_latency_and_made_up_inputs(gemm: Path) -> None:
    (latency,) = evaluate.onnx_latencies([gemm], length=5, repeats=3, threads=1)
    assert latency.milliseconds > 0
    assert (latency.repeats, latency.threads, latency.runtime) == (3, 1, "onnxruntime")
    session = onnx_session(gemm)
    feeds = example_feeds(session, 5)
    assert feeds["x"].shape == (1, 5, 8)
    assert feeds["x"].std() > 0.5
    assert feeds["mask"].tolist() == [[1] * 5]


def test_onnx_size_and_parameters(gemm: Path) -> None:
    data = gemm.with_name("model.onnx.data")
    assert evaluate.onnx_parameters(gemm) == 24
    assert evaluate.size_on_disk(gemm) == gemm.stat().st_size + data.stat().st_size
    assert data.stat().st_size >= 96


def test_size_of_a_checkpoint_is_that_of_its_weights(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("x" * 10_000)
    size = evaluate.size_on_disk(tmp_path)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    assert size >= evaluate.parameters(llama) * 4


def test_onnx_files_that_are_not_there_or_not_onnx(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="does not exist"):
        evaluate.onnx_latencies([tmp_path / "none.onnx"])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07garbage")
    with pytest.raises(LoadError, match="can't open"):
        evaluate.onnx_latencies([broken])
    with pytest.raises(LoadError, match="can't be read"):
        evaluate.onnx_parameters(broken)
    with pytest.raises(LoadError, match="does not exist"):
        evaluate.size_on_disk(tmp_path / "none")
