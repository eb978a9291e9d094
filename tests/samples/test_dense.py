"""The dense model's perplexity as a check of checkpoint, tokenizer and libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import CalibrationError, LoadError
from graphprune.samples import check_dense
from samples.helpers import pixels, tagger
from streaming.oracle import tokens, traced
from zoo import encoders

COUNTING = torch.arange(40).repeat(6, 1) + 5 * torch.arange(6)[:, None]
"""Each token is one more than the one before it."""


class Counter(nn.Module):
    """A causal model that knows how to count: the next token's logit is t, the others are 0."""

    def __init__(self, t, ahead=False):
        super().__init__()
        self.table = nn.Embedding(96, 96)
        self.table.weight.data = torch.eye(96).roll(1, 1) * t
        self.ahead = ahead

    def forward(self, input_ids):
        logits = self.table(input_ids)
        return logits.flip(1) if self.ahead else logits


def counter(t, ahead=False):
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    return gp.trace(Counter(t, ahead).eval(), (), example)


def test_a_model_that_knows_the_text_passes():
    program = counter(6.0)
    found = check_dense(program, COUNTING)
    assert found.value == pytest.approx(1 + 95 * math.exp(-6), rel=1e-5)
    assert (found.windows, found.length, found.vocabulary) == (4, 40, 96)
    assert check_dense(program, COUNTING[:, :12]).length == 12
    assert check_dense(program, {"input_ids": COUNTING.numpy()}).value == found.value


def test_nonsense_stops_the_run():
    with pytest.raises(CalibrationError, match="makes no sense") as caught:
        check_dense(counter(6.0), COUNTING.flip(1))
    for reason in ("tokenizer", "checkpoint", "version of a library", "vocabulary has 96"):
        assert reason in str(caught.value)
    with pytest.raises(CalibrationError, match="not finite"):
        check_dense(counter(float("nan")), COUNTING)


@pytest.mark.parametrize("perplexity", [9.5, 9.7])
def test_the_limit_is_a_tenth_of_the_vocabulary(perplexity):
    program = counter(math.log(95 / (perplexity - 1)))
    if perplexity < 9.6:
        assert check_dense(program, COUNTING).value == pytest.approx(perplexity)
    else:
        with pytest.raises(CalibrationError, match=r"is 9\.7, and its vocabulary has 96"):
            check_dense(program, COUNTING)


def test_tokens_outside_of_the_vocabulary():
    with pytest.raises(LoadError, match="token 144 is outside of its vocabulary of 96"):
        check_dense(counter(6.0), COUNTING + 90)


def test_models_and_data_without_a_perplexity():
    assert check_dense(traced(encoders.bert)[0], tokens()) is None
    assert check_dense(pixels(), torch.zeros(2, 3, 8, 12)) is None
    assert check_dense(tagger(), tokens() % 10) is None  # its three classes are no vocabulary
    assert check_dense(counter(6.0, ahead=True), COUNTING[:, :8].flip(1)) is None
    for data in ([{"input_ids": COUNTING}], torch.zeros(2, 5), None):
        assert check_dense(counter(6.0), data) is None


def test_an_onnx_model(tmp_path):
    program = counter(6.0)
    gp.apply(program, gp.Plan(program.fingerprint, {})).save(tmp_path / "m.onnx", "onnx")
    onnx = gp.load(str(tmp_path / "m.onnx"))
    found = check_dense(onnx, {"input_ids": np.asarray(COUNTING)})
    assert found.value == pytest.approx(1 + 95 * math.exp(-6), rel=1e-5)
    with pytest.raises(CalibrationError, match="makes no sense"):
        check_dense(onnx, {"input_ids": np.asarray(COUNTING.flip(1)).copy()})
