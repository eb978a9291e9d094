"""Causal language models of transformers, small and with random weights."""

from __future__ import annotations

from typing import Any

import transformers as hf

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(heads: int = 8, kv_heads: int = 2, dim: int = 8) -> hf.PreTrainedModel:
    sizes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes["head_dim"] = dim
    sizes |= {"hidden_size": 48} if heads % 3 == 0 else {}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | sizes))


def llama_mha():
    return llama(4, 4)


def llama_gqa_2():
    return llama(8, 4)


def llama_gqa_3():
    return llama(6, 2)


def llama_gqa_4():
    return llama(8, 2)


def llama_gqa_8():
    return llama(16, 2, 4)


def llama_mqa():
    return llama(4, 1)


def llama_tied():
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    return hf.LlamaForCausalLM(config)


def mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(**SMALL, num_key_value_heads=2))


def qwen2():
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, num_key_value_heads=2))


def qwen3():
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16))


def gemma2():
    config = hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, sliding_window=4)
    return hf.Gemma2ForCausalLM(config)


def gemma3():
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=4,
        layer_types=layers,
    )
    return hf.Gemma3ForCausalLM(config)


def phi3():
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL, num_key_value_heads=2))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(**OLD))


def gpt_neox():
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, rotary_pct=0.5))


def gptj():
    return hf.GPTJForCausalLM(hf.GPTJConfig(**OLD, rotary_dim=4))


def opt():
    config = hf.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        vocab_size=96,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return hf.OPTForCausalLM(config)


def bloom():
    return hf.BloomForCausalLM(
        hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=96, eos_token_id=2)
    )


def falcon(**options: Any) -> hf.PreTrainedModel:
    config = hf.FalconConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return hf.FalconForCausalLM(config)


def falcon_old():
    return falcon(new_decoder_architecture=False, multi_query=True)


def falcon_new():
    return falcon(new_decoder_architecture=True, num_kv_heads=2)


def falcon_alibi():
    return falcon(new_decoder_architecture=False, multi_query=False, alibi=True)


def mamba():
    config = hf.MambaConfig(
        hidden_size=16, num_hidden_layers=2, vocab_size=96, state_size=4, time_step_rank=3
    )
    return hf.MambaForCausalLM(config)
