"""Llamas of random weights in bfloat16, written shard by shard, and a tokenizer of bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SPREAD = 0.02
"""Standard deviation of the weights, as transformers begins with."""

DRAWN = 16_777_259
"""So many numbers are drawn, a prime; every matrix is a stretch of them, again and again."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama without grouped queries, whose head isn't tied to its embedding."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """How many numbers it has."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.inner + 2 * self.hidden
        return 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden


SHAPES = {
    "7b": Shape(hidden=4096, inner=11008, layers=32, heads=32, vocabulary=32000),
    "small": Shape(hidden=1024, inner=2752, layers=8, heads=8, vocabulary=8000),
}


def write_model(directory: Path, shape: Shape) -> None:
    """Write a checkpoint: a file for each layer and one for the rest.

    Its weights are random, but for this: layers add little to what they read, and the head knows
    the embedding. So it expects each token to come again, and windows in which tokens do make sense
    to it, without which it wouldn't be calibrated on them.
    """
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    places: dict[str, str] = {}
    for number, tensors in enumerate(_parts(shape)):
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 2 * shape.weights}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _parts(shape: Shape) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(DRAWN, generator=generator).mul_(SPREAD).to(torch.bfloat16)

    def normal(rows: int, columns: int) -> Tensor:
        start = int(torch.randint(DRAWN, (), generator=generator))
        count = rows * columns
        turns = [drawn[start:], *[drawn] * (count // DRAWN + 1)]
        return torch.cat(turns)[:count].view(rows, columns).clone()

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    embedding = normal(shape.vocabulary, shape.hidden) * 32
    yield {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": ones,
        "lm_head.weight": embedding * (32 / shape.hidden),
    }
    sizes = {
        **{f"self_attn.{n}_proj": (shape.hidden, shape.hidden) for n in "qkvo"},
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        found = {f"{prefix}.{name}.weight": normal(*size) for name, size in sizes.items()}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[f"{prefix}.{name}.weight"] /= 64
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{name}.weight"] = ones.clone()
        yield found


def write_tokenizer(directory: Path) -> None:
    """One token for each byte, so that any text can be read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
