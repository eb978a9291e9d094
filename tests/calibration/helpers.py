"""A tokenizer of one token per letter, and small models of each kind."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

import graphprune as gp
from graphprune.calibration.calibrate import calibration_samples
from graphprune.calibration.sources.section import Calibration

LETTERS = "".join(map(chr, range(33, 126)))
"""Each is its own token: the place that it has here."""


def save_tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {letter: number for number, letter in enumerate([*LETTERS, "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    return str(path)


def text_of(count, seed=0):
    """Letters, and their tokens."""
    ids = np.random.default_rng(seed).integers(0, len(LETTERS), count)
    return "".join(LETTERS[i] for i in ids), torch.from_numpy(ids)


@functools.cache
def pixels():
    """A model of images of 8 x 12 pixels, traced on a positional input."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    return gp.trace(module, (torch.zeros(2, 3, 8, 12),))


class Tagger(nn.Module):
    """A model that isn't of transformers: tokens [batch, 5 to 40]."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.out(self.table(tokens))


@functools.cache
def tagger():
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim("length", min=2, max=40)}
    return gp.trace(
        Tagger().eval(), (torch.zeros(2, 5, dtype=torch.int64),), None, {"tokens": sizes}
    )


def samples(program, seed=0, **wanted):
    """Samples of a section of a recipe, given by its keys."""
    return calibration_samples(program, Calibration(**wanted), seed)


def gradient(width, height):
    """An image whose red grows to the right and whose green grows downwards."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 5, y * 7, x * 0 + 50], axis=-1).astype(np.uint8)
