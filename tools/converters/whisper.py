"""Whisper in CTranslate2's format, split over two packages, as a Hugging Face checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from converters import ctranslate2

Variables = dict[str, np.ndarray]

# CTranslate2's name of a sublayer's norm and linears, and what they hold in transformers.
SELF_ATTENTION = ("self_attention", "self_attn", (("q", "k", "v"), ("out",)))
CROSS_ATTENTION = ("attention", "encoder_attn", (("q",), ("k", "v"), ("out",)))


def convert(source: Path, target: Path) -> None:
    """Write the float32 checkpoint, its tokenizer and its feature extractor."""
    parts = sorted(source.glob("model.bin.part*"))
    variables = ctranslate2.read(b"".join(part.read_bytes() for part in parts), "WhisperSpec")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        **{f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "pad", "unk")},
    )
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = _config(variables, tokenizer)
    model = WhisperForConditionalGeneration(config)
    weights = {name: torch.tensor(np.float32(value)) for name, value in _weights(variables, config)}
    model.load_state_dict(weights, strict=True)
    model.generation_config = _generation(settings, tokenizer, config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)


def _config(variables: Variables, tokenizer: PreTrainedTokenizerFast) -> WhisperConfig:
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    sizes: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        layers = {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")}
        sizes[f"{side}_layers"] = len(layers - {"layer_norm"})
        sizes[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = len(variables[f"{side}/layer_0/ffn/linear_0/weight"])
    end = tokenizer.eos_token_id
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        **sizes,
    )


def _weights(variables: Variables, config: WhisperConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every parameter under its transformers name."""
    for conv in ("conv1", "conv2"):
        yield from _pair(variables, f"encoder/{conv}", f"model.encoder.{conv}")
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        top = f"model.{side}"
        positions = variables[f"{side}/position_encodings/encodings"]
        yield f"{top}.embed_positions.weight", positions
        yield from _pair(variables, f"{side}/layer_norm", f"{top}.layer_norm")
        for i in range(count):
            old, new = f"{side}/layer_{i}", f"{top}.layers.{i}"
            yield from _attention(variables, old, new, *SELF_ATTENTION)
            if side == "decoder":
                yield from _attention(variables, old, new, *CROSS_ATTENTION)
            yield from _pair(variables, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
            yield from _pair(variables, f"{old}/ffn/linear_0", f"{new}.fc1")
            yield from _pair(variables, f"{old}/ffn/linear_1", f"{new}.fc2")
    for name in ("model.decoder.embed_tokens.weight", "proj_out.weight"):
        yield name, variables["decoder/embeddings/weight"]


def _attention(
    variables: Variables,
    old: str,
    new: str,
    block: str,
    name: str,
    linears: tuple[tuple[str, ...], ...],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield an attention's norm and projections, which CTranslate2 fuses where it can."""
    yield from _pair(variables, f"{old}/{block}/layer_norm", f"{new}.{name}_layer_norm")
    for i, projections in enumerate(linears):
        for part, whole in _pair(variables, f"{old}/{block}/linear_{i}", ""):
            pieces = np.split(whole, len(projections))
            for projection, piece in zip(projections, pieces, strict=True):
                if projection == "k" and part == ".bias":
                    if piece.any():
                        raise ValueError("Whisper's keys have no bias, these do")
                else:
                    yield f"{new}.{name}.{projection}_proj{part}", piece


def _pair(variables: Variables, old: str, new: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weight and the bias of a linear, convolution or norm."""
    weight, bias = ("gamma", "beta") if f"{old}/gamma" in variables else ("weight", "bias")
    yield f"{new}.weight", variables[f"{old}/{weight}"]
    yield f"{new}.bias", variables[f"{old}/{bias}"]


def _generation(
    settings: dict[str, list[int]], tokenizer: PreTrainedTokenizerFast, config: WhisperConfig
) -> GenerationConfig:
    """Return what ``generate(features, language="en", task="transcribe")`` needs to know."""
    number = tokenizer.convert_tokens_to_ids
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        no_timestamps_token_id=number("<|notimestamps|>"),
        is_multilingual=True,
        lang_to_id={tokenizer.convert_ids_to_tokens(i): i for i in settings["lang_ids"]},
        task_to_id={task: number(f"<|{task}|>") for task in ("transcribe", "translate")},
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        max_length=config.max_target_positions,
    )
