"""A small checkpoint, a text and a compiled output that the command-line tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune.pipeline.compiler
from cli.helpers import CYCLE, LETTERS, Result, teach
from graphprune.cli import app as cli


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GRAPHPRUNE_DEBUG", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokens are the printable letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("models") / "dense"
    LlamaForCausalLM(config).save_pretrained(path)
    words = {letter: number for number, letter in enumerate([*LETTERS, "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(3)
    letters = torch.randint(len(LETTERS), (5000,), generator=generator).tolist()
    path.write_text("".join(LETTERS[letter] for letter in letters))
    return path


@pytest.fixture(scope="session")
def compiled(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without a quarter of its ffn and one key-value head of three, in all formats."""
    output = tmp_path_factory.mktemp("compiled") / "slim"
    graphprune.pipeline.compiler.compile(
        str(dense),
        {
            "remove": {"ffn": 0.25, "kv_heads": "1/3"},
            "score": "taylor",  # a model of random weights makes no sense of any text
            "calibration": {"text": str(text), "windows": 8, "length": 32},
        },
        output,
        formats=["hf", "onnx", "pt2"],
    )
    return output


@pytest.fixture(scope="session")
def taught(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model after it has learnt a text."""
    return teach(dense, tmp_path_factory.mktemp("models") / "taught", layers=3)


@pytest.fixture(scope="session")
def cycles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text that it has learnt."""
    path = tmp_path_factory.mktemp("text") / "cycles.txt"
    path.write_text(CYCLE * 600)
    return path
