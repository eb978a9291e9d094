"""Sources that the tests of outputs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from files.small import TEXT
from graphprune.ir.onnx import files as onnx_files
from onnx_graphs import graph, weights


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A process that has parted from one with threads can't use them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "dense.onnx"
    onnx.save(graph(TEXT, a=weights(20, 16), c=weights(16, 3)), file)
    return file


@pytest.fixture
def beside(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with its weights in a second file, as outputs have them then."""
    monkeypatch.setattr(onnx_files, "STREAMED_ABOVE", 100)
    model = onnx.load(source)
    onnx.save(model, source, save_as_external_data=True, location="w.bin", size_threshold=0)
    return source


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with zeros, whose embedding takes 16 pages."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter.abs() < 0.01] = 0
    path = tmp_path_factory.mktemp("models") / "dense"
    model.save_pretrained(path)
    return path
