"""A Llama of a billion random weights in bfloat16, for tools/bench oneshot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, LAYERS, HEADS, GROUPS, VOCABULARY = 2048, 8192, 16, 32, 8, 128256
HEAD = HIDDEN // HEADS
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (GROUPS * HEAD, HIDDEN),
    "self_attn.v_proj": (GROUPS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write(directory: Path) -> None:
    """Write the checkpoint, a file for each layer and one for the rest."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_CONFIG, indent=1), encoding="utf-8")
    places: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_parts()):
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def describe(directory: Path) -> str:
    """The model in words."""
    size = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    return f"a random Llama, {size / 2e9:.2f} billion weights, {size / 1e9:.2f} GB in bfloat16"


def _parts() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "model.norm.weight": ones}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found = {f"{prefix}.{name}.weight": normal(*shape) for name, shape in SHAPES.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{name}.weight"] = ones.clone()
        yield found
