"""The dense model's perplexity as a check of checkpoint, tokenizer and libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from calibration.helpers import pixels, tagger
from graphprune.calibration.dense import check_dense
from graphprune.calibration.text.frequencies import entropy
from graphprune.errors import CalibrationError, LoadError
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


class Letters(nn.Module):
    """A model of tokens without an order: the logits of the next are always the same."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Embedding(len(logits), len(logits))
        self.table.weight.data = logits.float().expand(len(logits), -1).clone()

    def forward(self, input_ids):
        return self.table(input_ids)


def letters(probabilities):
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    return gp.trace(Letters(probabilities.log()).eval(), (), example)


def draws(probabilities, length=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probabilities.expand(4, -1), length, True, generator=generator)


def untrained(vocabulary, seed=0):
    """Logits of a model that has learnt nothing."""
    torch.manual_seed(seed)
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    module = nn.Embedding(vocabulary, vocabulary)
    nn.init.normal_(module.weight, std=0.3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = module

        def forward(self, input_ids):
            return self.table(input_ids)

    return gp.trace(Model().eval(), (), example)


def test_a_perfect_model_of_eight_letters_passes():
    even = torch.full((8,), 1 / 8)
    for seed in range(3):
        for length in (16, 512):
            found = check_dense(letters(even), draws(even, length, seed))
            assert found.value == pytest.approx(8)
    uneven = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
    found = check_dense(letters(uneven), draws(uneven))
    assert math.log(found.value) == pytest.approx(-float((uneven * uneven.log()).sum()), abs=0.05)
    cycle = torch.arange(8).repeat(4, 8)
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    knowing = Counter(9.0)
    knowing.table = nn.Embedding.from_pretrained(torch.eye(8).roll(1, 1) * 9)
    assert check_dense(gp.trace(knowing.eval(), (), example), cycle).value < 1.01


def english(vocabulary):
    """How often tokens occur in natural text: the n-th most frequent in proportion to 1 / n."""
    ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    return ((1 / ranks) / (1 / ranks).sum()).float()


@pytest.mark.parametrize("vocabulary", [30, 96, 1000])
@pytest.mark.parametrize("length", [12, 64, 512])
def test_frequencies_make_some_sense_of_a_text_and_guessing_none(vocabulary, length):
    shares = english(vocabulary)
    text = draws(shares, length)
    assert check_dense(letters(shares), text).value < vocabulary
    with pytest.raises(CalibrationError, match="makes no sense"):
        check_dense(untrained(vocabulary), text)
    # The tokens of another tokenizer: as many, with other numbers.
    other = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))
    with pytest.raises(CalibrationError, match="makes no sense"):
        check_dense(letters(shares), other[text])


def test_the_frequencies_of_a_sample_stand_for_those_of_where_it_is_from():
    for vocabulary in (8, 96, 5000):
        shares = english(vocabulary).double()
        truth = -float((shares * shares.log()).sum())
        for length in (16, 128, 512):
            found = entropy(draws(shares.float(), length), vocabulary)
            assert truth - 0.15 < found <= math.log(vocabulary)
    # Tokens that all occur once say nothing; a tenth of the vocabulary is taken to be left.
    assert entropy(torch.arange(60), 5000) == pytest.approx(math.log(494) + 0.84, abs=0.02)


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
