"""A small language model with zeros, as a checkpoint and as an ONNX decoder."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def sparse_llama(tmp_path_factory) -> Path:
    """Half of the weights of every linear layer are zero; the embedding is the head too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=90,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.weight.data.masked_fill_(torch.rand(layer.weight.shape) < 0.5, 0)
    path = tmp_path_factory.mktemp("llama") / "sparse"
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _own_table(monkeypatch, tmp_path) -> None:
    """Measured times aren't kept in the user's directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
