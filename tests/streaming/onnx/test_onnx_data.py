"""Samples for ONNX models: windows, arrays, mappings; what doesn't fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.errors import PlanError
from graphprune.streaming import Batch, batches
from onnx_graphs import graph, weights
from streaming.onnx_oracle import program_of


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A model of token ids, with the inputs that exporters of encoders write."""
    model = graph(
        """m (int64[b, n] input_ids, float[b, n] attention_mask, int64[b, n] token_type_ids,
              int64[b, n] position_ids) => (float[b, n, 4] z) {
            a = Gather (table, input_ids)
            t = Gather (types, token_type_ids)
            p = Gather (places, position_ids)
            x = Sum (a, t, p)
            axis = Constant <value = int64[1] {2}> ()
            wide = Unsqueeze (attention_mask, axis)
            m = Mul (x, wide)
            y = MatMul (m, first)
            z = MatMul (y, head)
        }""",
        table=weights(20, 6), types=weights(2, 6), places=weights(12, 6), first=weights(6, 6),
        head=weights(6, 4),
    )  # fmt: skip
    return program_of(model, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    model = graph(
        """m (float[b, 3, 8, 8] x) => (float[b, 4, 4, 4] z) {
            c = Conv (x, first)
            z = Conv (c, second)
        }""",
        first=weights(5, 3, 3, 3), second=weights(4, 5, 3, 3),
    )  # fmt: skip
    return program_of(model, tmp_path_factory.mktemp("image"))


WINDOWS = np.arange(35).reshape(5, 7) % 20


@pytest.mark.parametrize("data", [WINDOWS, torch.from_numpy(WINDOWS), lambda: WINDOWS])
def test_token_windows_give_all_inputs(text, data):
    made = batches(text, data, batch=2)
    assert [(b.first, b.count) for b in made] == [(0, 2), (2, 2), (4, 1)]
    first = made[0].kwargs
    assert list(first) == ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
    assert torch.equal(first["input_ids"], torch.from_numpy(WINDOWS[:2]))
    assert torch.equal(first["attention_mask"], torch.ones(2, 7))
    assert torch.equal(first["token_type_ids"], torch.zeros(2, 7, dtype=torch.int64))
    assert torch.equal(first["position_ids"], torch.arange(7).expand(2, 7))


def test_arrays_mappings_and_sequences(image, text):
    pictures = weights(4, 3, 8, 8)
    expected = torch.from_numpy(pictures)
    samples = [pictures[i : i + 1] for i in range(4)]
    forms = [
        pictures,
        expected,
        {"x": pictures},
        samples,
        [(x,) for x in samples],
        [{"x": x} for x in samples],
        [Batch((), {"x": torch.from_numpy(x)}) for x in samples],
        (x for x in samples),
        lambda: samples,
        pictures.astype(np.float64),
    ]
    for form in forms:
        made = batches(image, form)
        assert [(b.first, b.count) for b in made] == [(0, 1), (1, 1), (2, 1), (3, 1)]
        assert torch.equal(torch.cat([b.kwargs["x"] for b in made]), expected)
        assert {b.kwargs["x"].dtype for b in made} == {torch.float32}
    whole = batches(text, [{
        "input_ids": WINDOWS, "attention_mask": np.ones((5, 7), np.float32),
        "token_type_ids": WINDOWS * 0, "position_ids": WINDOWS * 0,
    }])  # fmt: skip
    assert [b.count for b in whole] == [5]


def test_samples_are_copied(image):
    pictures = weights(1, 3, 8, 8)
    (made,) = batches(image, pictures)
    pictures[:] = 0
    assert bool(made.kwargs["x"].any())


def test_what_does_not_fit_is_refused(image, text):
    for data, match in (
        ([], "no calibration data"),
        (np.zeros((2, 3, 9, 8), np.float32), "the shape of the model's input"),
        (np.zeros((2, 3, 8, 8), np.int64), "the type of the model's input"),
        ({"x": weights(1, 3, 8, 8), "y": weights(1, 2)}, "don't have the inputs"),
        ({"z": weights(1, 3, 8, 8)}, "don't have the inputs"),
        ("text", "no calibration data"),
        (3, "no calibration data"),
    ):
        with pytest.raises(PlanError, match=match):
            batches(image, data)
    with pytest.raises(PlanError, match="doesn't determine all inputs"):
        batches(text, weights(5, 7))
    with pytest.raises(PlanError, match="different numbers of samples"):
        batches(text, {"input_ids": WINDOWS, "position_ids": WINDOWS[:2]})
    with pytest.raises(PlanError, match="at least one sample"):
        batches(text, WINDOWS, batch=0)


def test_windows_for_a_model_with_other_inputs_are_refused(tmp_path):
    model = graph(
        """m (int64[b, n] tokens, float[b, 6] speaker) => (float[b, n, 4] z) {
            a = Gather (table, tokens)
            axis = Constant <value = int64[1] {1}> ()
            wide = Unsqueeze (speaker, axis)
            x = Add (a, wide)
            z = MatMul (x, head)
        }""",
        table=weights(20, 6), head=weights(6, 4),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    with pytest.raises(PlanError, match="token windows don't determine all inputs") as caught:
        batches(program, WINDOWS)
    assert caught.value.where == "tokens, speaker"
    made = batches(program, {"tokens": WINDOWS, "speaker": weights(5, 6)})
    assert len(made) == 5


def test_masks_say_what_is_padding(text):
    mask = np.ones((2, 7), np.float32)
    mask[1, 4:] = 0
    data = {
        "input_ids": WINDOWS[:2], "attention_mask": mask, "token_type_ids": WINDOWS[:2] * 0,
        "position_ids": np.arange(7)[None].repeat(2, 0),
    }  # fmt: skip
    made = batches(text, data)
    assert made[0].valid == {}  # of this sample nothing is padding
    assert torch.equal(made[1].valid["input_ids"], torch.from_numpy(mask[1:] > 0))


def test_a_mask_that_the_model_does_not_take(tmp_path):
    model = graph(
        """m (int64[b, n] input_ids) => (float[b, n, 4] z) {
            x = Gather (table, input_ids)
            z = MatMul (x, head)
        }""",
        table=weights(20, 6), head=weights(6, 4),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    mask = np.ones((1, 7), np.int64)
    mask[0, 5:] = 0
    (made,) = batches(program, {"input_ids": WINDOWS[:1], "attention_mask": mask})
    assert torch.equal(made.valid["input_ids"], torch.from_numpy(mask > 0))
    assert list(made.kwargs) == ["input_ids"]
    with pytest.raises(PlanError, match="padding on the left"):
        batches(program, {"input_ids": WINDOWS[:1], "attention_mask": mask[:, ::-1].copy()})


def test_padding_of_inputs_that_are_no_tokens_is_refused(tmp_path):
    model = graph(
        """m (float[b, n, 6] inputs_embeds, int64[b, n] attention_mask) => (float[b, n, 4] z) {
            m = Cast <to = 1> (attention_mask)
            axis = Constant <value = int64[1] {2}> ()
            wide = Unsqueeze (m, axis)
            x = Mul (inputs_embeds, wide)
            z = MatMul (x, head)
        }""",
        head=weights(6, 4),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    mask = np.ones((1, 7), np.int64)
    data = {"inputs_embeds": weights(1, 7, 6), "attention_mask": mask}
    assert batches(program, data)[0].valid == {}
    mask[0, 5:] = 0
    with pytest.raises(PlanError, match="padding can't be told from tokens"):
        batches(program, data)
