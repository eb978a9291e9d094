"""What is known about the encoders and vision models of transformers, for `test_pretrained`.

See `expected_pretrained` for how to read it.
"""

from __future__ import annotations

import torch

from zoo import encoders, vision
from zoo.pretrained import HEAD_DIMS, Pretrained


def noisy():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 8, 8, generator=generator)
    return image, torch.rand(2, generator=generator), torch.tensor([1, 2])


ENCODERS = [
    Pretrained(
        encoders.bert,
        {
            "hidden": (32,),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (48, 48),
            "layers": (2,),
        },
        0.99553,
        {"cls.predictions.bias:0": "indexed by values from outside"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.roberta,
        {
            "hidden": (32,),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (48, 48, 32),
            "layers": (2,),
        },
        0.99991,
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.distilbert,
        {
            "hidden": (32,),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (48, 48, 32),
            "layers": (2,),
        },
        0.99991,
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.deberta_v2,
        {
            "hidden": (32,),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "latent": (32,),
            "ffn": (48, 48, 32),
            "layers": (2,),
        },
        0.99992,
        beyond=("qk_dim",),
        same_class=False,
    ),
    Pretrained(
        encoders.deberta_v2_shared,
        {
            "hidden": (32,),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (48, 48),
            "layers": (2,),
        },
        0.99992,
        beyond=("qk_dim", "layers"),
        same_class=False,
    ),
    Pretrained(
        encoders.albert,
        {"hidden": (12, 32), "kv_heads": (4,), "qk_dim": (8,), "v_dim": (8,), "ffn": (48,)},
        0.99077,
        {"predictions.bias:0": "indexed by values from outside"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.modernbert,
        {"hidden": (32,), "kv_heads": (4, 4), "qk_dim": (4, 4), "ffn": (48, 48), "layers": (2,)},
        0.99559,
        {"decoder.bias:0": "indexed by values from outside"},
        beyond=("qk_dim",),
        same_class=False,
    ),
    Pretrained(
        encoders.t5,
        {
            "hidden": (32,),
            "qk_dim": (8, 8, 8, 8, 8, 8),
            "kv_heads": (4, 4, 4),
            "v_dim": (8, 8, 8, 8, 8, 8),
            "ffn": (48, 48, 48, 48),
            "layers": (2, 2),
        },
        1.0,
        {
            "shared.weight:0": "indexed by values from outside",
            "*.relative_attention_bias.weight:0": "indexed by values from outside",
        },
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.t5_gated,
        {
            "hidden": (32,),
            "qk_dim": (6, 6, 6, 6, 6, 6),
            "kv_heads": (4, 4, 4),
            "v_dim": (6, 6, 6, 6, 6, 6),
            "ffn": (48, 48, 48, 48),
            "layers": (2, 2),
        },
        1.0,
        {
            "shared.weight:0": "indexed by values from outside",
            "*.relative_attention_bias.weight:0": "indexed by values from outside",
        },
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.bart,
        {
            "hidden": (32,),
            "kv_heads": (4, 4, 4, 4, 4, 4),
            "qk_dim": (8, 8, 8, 8, 8, 8),
            "v_dim": (8, 8, 8, 8, 8, 8),
            "ffn": (48, 48, 40, 40),
            "layers": (2, 2),
        },
        1.0,
        {"model.shared.weight:0": "indexed by values from outside"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.whisper,
        {
            "channels": (32,),
            "hidden": (32, 32),
            "kv_heads": (4, 4, 4, 4, 4, 4),
            "qk_dim": (8, 8, 8, 8, 8, 8),
            "v_dim": (8, 8, 8, 8, 8, 8),
            "ffn": (48, 48, 40, 40),
            "layers": (2, 2),
        },
        1.0,
        {"model.encoder.embed_positions.weight:0": "spatial"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.wav2vec2_group,
        {
            "channels": (8, 8),
            "hidden": (8, 4),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (48, 48),
            "layers": (2,),
        },
        0.99337,
        {"wav2vec2.masked_spec_embed:0": "no operator reads it"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        encoders.wav2vec2_layer,
        {
            "channels": (8, 8),
            "hidden": (8, 4),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (48, 48),
            "layers": (2,),
        },
        0.99339,
        {"wav2vec2.masked_spec_embed:0": "no operator reads it"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.vit,
        {
            "hidden": (32,),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (48, 48),
            "layers": (2,),
        },
        0.99991,
        {"vit.embeddings.position_embeddings:1": "spatial"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.deit,
        {
            "hidden": (32,),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (48, 48),
            "layers": (2,),
        },
        0.99982,
        {"deit.embeddings.position_embeddings:1": "spatial"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.dinov2,
        {
            "hidden": (32,),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "v_dim": (8, 8),
            "ffn": (128, 128),
            "layers": (2,),
        },
        0.99894,
        {
            "dinov2.embeddings.mask_token:1": "no operator reads it",
            "dinov2.embeddings.position_embeddings:1": "spatial",
        },
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.swin,
        {
            "hidden": (24, 48),
            "qk_dim": (8, 8, 8, 8),
            "kv_heads": (3, 3, 6, 6),
            "v_dim": (8, 8, 8, 8),
            "ffn": (96, 96, 192, 192),
            "layers": (2, 2),
        },
        0.99997,
        {"*.relative_position_bias_table:0": "a table of constant places"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.swin_v2,
        {
            "hidden": (24, 48),
            "kv_heads": (3, 3, 6, 6),
            "ffn": (512, 96, 512, 96, 512, 192, 512, 192),
            "latent": (2, 2, 2, 2),
            "qk_dim": (8, 8, 8, 8),
            "v_dim": (8, 8, 8, 8),
            "layers": (2, 2),
        },
        0.99998,
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.convnext,
        {"channels": (8, 12), "ffn": (32, 32, 48, 48), "layers": (2, 2)},
        0.99969,
    ),
    Pretrained(
        vision.segformer,
        {
            "hidden": (16, 32),
            "kv_heads": (2, 2, 4, 4),
            "qk_dim": (8, 8, 8, 8),
            "latent": (16, 16),
            "v_dim": (8, 8, 8, 8),
            "ffn": (32, 32, 64, 64),
            "channels": (24, 24, 24),
            "layers": (2, 2),
        },
        0.99986,
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.clip,
        {
            "hidden": (24, 32),
            "kv_heads": (4, 4, 4, 4),
            "qk_dim": (6, 6, 8, 8),
            "v_dim": (6, 6, 8, 8),
            "ffn": (40, 40, 48, 48),
            "layers": (2, 2),
        },
        0.99997,
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.sam,
        {
            "hidden": (32,),
            "qk_dim": (8, 8),
            "kv_heads": (4, 4),
            "ffn": (48, 48),
            "channels": (12,),
            "layers": (2,),
        },
        0.99898,
        {"vision_encoder.pos_embed:?": "spatial", "*.attn.rel_pos_?:0": "spatial"},
        beyond=("qk_dim",),
        same_class=False,
    ),
    Pretrained(
        vision.detr,
        {
            "channels": (8, 12, 12, 16, 16),
            "hidden": (32, 8),
            "kv_heads": (4, 4, 4, 4, 4, 4),
            "qk_dim": (8, 8, 8, 8, 8, 8),
            "v_dim": (8, 8, 8, 8, 8, 8),
            "ffn": (40, 40, 48, 48, 32, 32),
            "layers": (2, 2),
        },
        0.99979,
        {"model.query_position_embeddings.weight:0": "its places compete for attention"},
        beyond=HEAD_DIMS,
    ),
    Pretrained(
        vision.dit,
        {
            "hidden": (32, 32),
            "ffn": (32, 5, 48, 48),
            "kv_heads": (4, 4),
            "qk_dim": (8, 8),
            "layers": (2,),
        },
        0.99861,
        {"position:1": "spatial", "label.weight:0": "indexed by values from outside"},
        beyond=("ffn", "qk_dim"),
        same_class=False,
        inputs=noisy,
    ),
]
