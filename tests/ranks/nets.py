"""Small programs and samples for runs that processes share."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from graphprune.frontends.tracing.trace import trace

VOCABULARY = 96


@cache
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    return trace(model, kwargs={"input_ids": windows(2)})


@cache
def mixtral():
    """A mixture of experts of which a single window rarely visits all."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("batched_mm")
    return trace(model, kwargs={"input_ids": windows(2)})


@cache
def layer():
    """Two linear layers, whose inputs are numbers."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    return trace(module.eval(), (torch.randn(2, 5),))


def windows(count, length=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, length), generator=generator)


def ragged():
    """Samples of several lengths, two of which have padding."""
    found = []
    for seed, length in enumerate((5, 9, 12, 3, 7)):
        ids = windows(2, length, seed)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0 if seed % 2 else 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
