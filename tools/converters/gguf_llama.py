"""A GGUF file that holds a Llama, as a float32 Hugging Face checkpoint.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GGUF_CONTROL_TOKEN = 3

# Where a GGUF file keeps what transformers calls by the second name.
LLAMA_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def convert(source: Path, target: Path) -> None:
    """Dequantise a GGUF Llama with tied embeddings into a float32 Hugging Face directory."""
    (path,) = source.glob("*.gguf")
    reader = GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    special = {
        role: int(meta[f"tokenizer.ggml.{key}_token_id"])
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    ids = {f"{role}_token_id": special[role] for role in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        **ids,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        name, kind = _llama_name(tensor.name)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        state[name] = _rotary_halves(weight, heads[kind]) if kind in heads else weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(target)
    _gguf_tokenizer(meta, special).save_pretrained(target)


def _llama_name(name: str) -> tuple[str, str]:
    """Translate ``blk.3.attn_q.weight``; also return the kind, here ``attn_q``."""
    match name.split("."):
        case ["blk", layer, kind, "weight"]:
            return f"model.layers.{layer}.{LLAMA_LAYER_NAMES[kind]}.weight", kind
        case [kind, "weight"]:
            return f"{LLAMA_TOP_NAMES[kind]}.weight", kind
    raise ValueError(f"unknown GGUF tensor {name}")


def _rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaving of the rows that a rotary embedding pairs.

    Args:
        weight: ``[heads * head_dim, hidden]``, pairs in adjacent rows.
        heads: How many heads the rows make up.

    Returns:
        The same rows with each head's pairs ``head_dim / 2`` apart, as transformers wants them.
    """
    rows, columns = weight.shape
    return weight.view(heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)


def _gguf_tokenizer(meta: dict[str, object], special: dict[str, int]) -> PreTrainedTokenizerFast:
    """Rebuild SmolLM's byte-level BPE, which also splits numbers into digits."""
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError(f"unknown GGUF tokenizer {meta['tokenizer.ggml.pre']}")
    words: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(words, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(w, special=True, normalized=False) for w, t in types if t == GGUF_CONTROL_TOKEN]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=meta["llama.context_length"],
        chat_template=meta["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": words[index] for role, index in special.items()},
    )
