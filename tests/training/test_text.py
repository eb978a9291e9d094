"""Files of tokens: documents packed with separators, and which tokens count."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graphprune.errors import LoadError
from graphprune.training import Training, recover, token_file
from streaming.oracle import traced
from zoo import decoders

WORDS = ["<eos>", "<unk>", "user", "assistant", ":", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")
    found.chat_template = TEMPLATE
    return found


def written(folder, *records):
    file = folder / "data.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return file


def words(tokens):
    return " ".join(WORDS[t] for t in tokens.flatten().tolist())


def test_documents_are_packed_with_separators(tmp_path, tokenizer):
    file = written(tmp_path, "a b c", {"text": "d e"}, {"input_ids": [10, 11]}, "g h")
    found = token_file(file, tokenizer, 4, tmp_path / "tokens")
    assert len(found) == 3
    assert words(found.take([0, 1, 2])) == "a b c <eos> d e <eos> f g <eos> g h"
    assert words(found.take([2, 0])) == "g <eos> g h a b c <eos>"
    assert (found.folder / "tokens.bin").stat().st_size == 2 * 12


def test_only_answers_count(tmp_path, tokenizer):
    turns = [("user", "a b"), ("assistant", "c d"), ("user", "e"), ("assistant", "f")]
    file = written(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]})
    found = token_file(file, tokenizer, 14, tmp_path / "tokens").take([0])
    assert words(found["input_ids"]) == "user : a b assistant : c d user : e assistant : f"
    wanted = found["labels"] != -100
    assert words(found["input_ids"][wanted]) == "c d f"
    assert torch.equal(found["labels"][wanted], found["input_ids"][wanted])


def test_given_labels_and_borders(tmp_path, tokenizer):
    file = written(
        tmp_path, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "d e f", {"text": "g"}
    )
    labels = token_file(file, tokenizer, 9, tmp_path / "tokens", across=False).take([0])["labels"]
    assert labels.tolist() == [[-100, 6, 7, 0, -100, 9, 10, 0, -100]]


def test_a_file_is_made_once_for_each_text_and_tokenizer(tmp_path, tokenizer, monkeypatch):
    file = written(tmp_path, "a b c d")
    first = token_file(file, tokenizer, 2, tmp_path / "tokens")
    again = token_file(file, tokenizer, 4, tmp_path / "tokens")
    assert first.folder == again.folder
    assert first.digest() != again.digest()
    tokenizer.add_tokens(["a b"])
    assert token_file(file, tokenizer, 2, tmp_path / "tokens").folder != first.folder
    other = written(tmp_path, "a b c e")
    assert token_file(other, tokenizer, 2, tmp_path / "tokens").folder != first.folder


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5, 6], "labels": [6, 5]}, "labels of a record don't fit"),
        ({"messages": ["a"]}, "a record holds no conversation"),
        ({"other": 1}, "a record holds no text"),
    ],
)
def test_lines_that_are_something_else(tmp_path, tokenizer, record, message):
    file = written(tmp_path, "a b", record)
    with pytest.raises(LoadError, match=message) as error:
        token_file(file, tokenizer, 2, tmp_path / "tokens")
    assert error.value.where == f"{file}:2"
    assert not list((tmp_path / "tokens").glob("*"))


def test_training_on_answers(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    file = written(tmp_path, *[{"messages": turns}] * 4)
    windows = token_file(file, tokenizer, 9, tmp_path / "tokens")
    program = traced(decoders.llama_gqa_4)[0]
    found = recover(program, windows, Training(steps=20, batch=2, lr=1e-2, warmup=0.0))
    assert found.losses[-1] < found.losses[0] / 4
    assert found.tokens == 20 * 2 * 2
