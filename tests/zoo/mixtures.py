"""Mixtures of experts of transformers, small and with random weights."""

from __future__ import annotations

import transformers as hf

from zoo.decoders import SMALL

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 40,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
}


def mixtral():
    config = hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    return hf.MixtralForCausalLM(config)


def qwen2_moe():
    config = hf.Qwen2MoeConfig(
        **SMALL,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=20,
    )
    return hf.Qwen2MoeForCausalLM(config)


def qwen3_moe():
    config = hf.Qwen3MoeConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        norm_topk_prob=True,
    )
    return hf.Qwen3MoeForCausalLM(config)


def deepseek_v2():
    """Groups of experts, of which the best ones' experts are chosen."""
    config = hf.DeepseekV2Config(
        **SMALL, **LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2
    )
    return hf.DeepseekV2ForCausalLM(config)


def deepseek_v3():
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**SMALL, **LATENT, n_group=4, topk_group=2, rope_interleave=True)
    )


def gpt_oss():
    """Biased experts, attention sinks."""
    config = hf.GptOssConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return hf.GptOssForCausalLM(config)
