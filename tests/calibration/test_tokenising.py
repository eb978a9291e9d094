"""Long texts are tokenised in pieces, to the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graphprune.calibration.text import tokenising
from graphprune.calibration.text.read import read_text
from graphprune.calibration.text.tokenising import tokenised

TEXT = read_text()[:60_000]


def byte_level() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer, trainers.BpeTrainer


def metaspace() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.BpeTrainer


def whole() -> tuple[Tokenizer, Any]:
    """As Llama's first: a space in front, and merges over the whole text."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return tokenizer, trainers.BpeTrainer


def words() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer


@pytest.mark.parametrize("kind", [byte_level, metaspace, whole, words])
def test_pieces_have_the_tokens_of_the_whole(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, trainer = kind()
    parts = [TEXT[i : i + 2000] for i in range(0, 20_000, 2000)]
    tokenizer.train_from_iterator(parts, trainer(vocab_size=500, special_tokens=["[UNK]"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    expected = torch.tensor(fast(TEXT, add_special_tokens=False)["input_ids"])
    lengths = []

    def watched(text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return fast(text, **options)

    monkeypatch.setattr(tokenising, "PIECE", 2000)
    found = tokenised(watched, TEXT)
    assert torch.equal(found, expected)
    assert max(lengths) <= 2000


def test_a_text_without_spaces_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "PIECE", 100)

    def letters(text: str, **_: Any) -> dict[str, list[int]]:
        assert len(text) <= 400
        return {"input_ids": [ord(letter) for letter in text]}

    text = "abc" * 1000
    assert tokenised(letters, text).tolist() == [ord(letter) for letter in text]
