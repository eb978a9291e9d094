"""Encoders and encoder-decoders of transformers, small and with random weights."""

from __future__ import annotations

from typing import Any

import transformers as hf

from zoo.decoders import SMALL

ENCODER = {k: v for k, v in SMALL.items() if k != "bos_token_id" and k != "eos_token_id"}
PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def bert():
    return hf.BertForMaskedLM(hf.BertConfig(**ENCODER))


def roberta():
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER))


def distilbert():
    config = hf.DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=96, max_position_embeddings=64
    )
    return hf.DistilBertForSequenceClassification(config)


def deberta_v2():
    config = hf.DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=False,
    )
    return hf.DebertaV2ForSequenceClassification(config)


def deberta_v2_shared():
    """Positions go through the projections of the content; a convolution beside the layers."""
    config = hf.DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
        conv_act="gelu",
    )
    return hf.DebertaV2ForTokenClassification(config)


def albert():
    config = hf.AlbertConfig(**ENCODER, embedding_size=12)
    return hf.AlbertForMaskedLM(config)


def modernbert():
    config = hf.ModernBertConfig(
        **SMALL,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=4,
        global_attn_every_n_layers=2,
    )
    return hf.ModernBertForMaskedLM(config)


def t5():
    """The first layer's table of position biases is every layer's."""
    config = hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=96,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def t5_gated():
    config = hf.T5Config(
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=96,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return hf.T5ForConditionalGeneration(config)


def bart():
    config = hf.BartConfig(**PAIR, max_position_embeddings=64, forced_eos_token_id=2)
    return hf.BartForConditionalGeneration(config)


def whisper():
    config = hf.WhisperConfig(
        **PAIR,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def wav2vec2(**options: Any) -> hf.PreTrainedModel:
    config = hf.Wav2Vec2Config(
        **ENCODER,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
        **options,
    )
    return hf.Wav2Vec2ForCTC(config)


def wav2vec2_group():
    """Group norm in the feature extractor, layer norm after every block."""
    return wav2vec2(feat_extract_norm="group")


def wav2vec2_layer():
    return wav2vec2(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
