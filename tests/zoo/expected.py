"""What is known about every plain module of the zoo: golden numbers, checked by `test_modules`.

A number that falls means that a rule has become lazy; one that rises is to be entered here.
"""

from __future__ import annotations

import torch

from zoo import convolutional, plain, recurrent
from zoo.case import Case

IMAGE = ((2, 3, 8, 8),)
SEQUENCE = ((2, 5, 8),)
STEPS = ((2, 4, 5),)


def ids(rows):
    return lambda: (torch.randint(0, rows, (2, 5), generator=torch.Generator().manual_seed(1)),)


CASES = [
    Case(
        convolutional.resnet_basic, IMAGE, {"channels": (8, 8, 16, 16, 16), "layers": (3,)}, 0.99949
    ),
    Case(
        convolutional.resnet_padded,
        IMAGE,
        {"channels": (8, 8, 16, 4, 4, 16), "layers": (3,)},
        0.99948,
    ),
    Case(
        convolutional.resnet_bottleneck,
        IMAGE,
        {"channels": (8, 4, 4, 16, 6, 6), "layers": (2,)},
        0.99626,
    ),
    Case(
        convolutional.resnext,
        IMAGE,
        {"channels": (8, 4, 3, 3, 16, 4, 3, 3), "layers": (2,)},
        0.99745,
    ),
    Case(
        convolutional.mobilenet,
        IMAGE,
        {"channels": (8, 16, 6, 24, 6, 12, 24, 6), "ffn": (20,), "layers": (3,)},
        0.99863,
    ),
    Case(
        convolutional.efficientnet,
        IMAGE,
        {"channels": (8, 16, 4, 24, 4, 12, 24, 4), "ffn": (20,), "layers": (3,)},
        0.99853,
    ),
    Case(
        convolutional.mobilenet_v2,
        IMAGE,
        {"channels": (8, 16, 24, 12, 24), "ffn": (20,), "layers": (3,)},
        0.99822,
    ),
    Case(
        convolutional.densenet,
        IMAGE,
        {"channels": (8, 12, 6, 12, 6, 12, 6, 12, 12, 6, 12, 6)},
        0.99904,
    ),
    Case(
        convolutional.unet_batch_norm,
        IMAGE,
        {"channels": (8, 8, 12, 12, 16, 16, 12, 12, 8, 12, 8, 8)},
        0.99986,
    ),
    Case(
        convolutional.unet_group_norm,
        IMAGE,
        {"channels": (4, 2, 4, 2, 4, 3, 4, 3, 4, 4, 4, 4, 12, 8, 4, 3, 4, 3, 4, 2, 4, 2)},
        0.99985,
    ),
    Case(convolutional.shufflenet, IMAGE, {"channels": (16, 2, 2, 4, 8, 8, 8, 20)}, 0.99764),
    Case(convolutional.shufflenet_grouped, IMAGE, {"channels": (6, 2, 6)}, 0.99482),
    Case(
        convolutional.shufflenet_uneven,
        IMAGE,
        {"channels": (4,)},
        0.69045,
        {
            place: "axes whose structures don't fit (conv2d_3 at convolutional.py"
            for place in (
                "one.weight:0",
                "one.bias:0",
                "depth.weight:0",
                "depth.bias:0",
                "two.weight:1",
            )
        },
    ),
    Case(
        convolutional.convnext,
        IMAGE,
        {"channels": (8, 12), "ffn": (20, 20, 24), "layers": (2,)},
        0.99780,
    ),
    Case(convolutional.video, ((2, 3, 3, 4, 4),), {"channels": (8, 12)}, 0.99518),
    Case(
        convolutional.text_conv,
        ids(20),
        {"channels": (10, 6)},
        0.99461,
        {"embed.weight:0": "indexed by values from outside (embedding at convolutional.py"},
    ),
    Case(
        convolutional.inception,
        IMAGE,
        {"channels": (8, 4, 6, 8, 4, 4, 4, 4, 4, 6, 8, 4, 4, 4, 4)},
        0.99760,
    ),
    Case(
        convolutional.yolo_c2f,
        IMAGE,
        {"channels": (8, 6, 6, 12, 6, 6, 6, 6, 12, 6, 6, 6, 12), "layers": (2,)},
        0.99670,
        same_class=False,
    ),
    Case(convolutional.yolo_implicit, IMAGE, {"channels": (10, 12)}, 0.99216),
    Case(convolutional.pixel_shuffle, IMAGE, {"channels": (4, 12, 8)}, 0.99771),
    Case(convolutional.space_to_depth, IMAGE, {"channels": (8, 10)}, 0.99489),
    Case(convolutional.depth_multiplier, IMAGE, {"channels": (8, 3)}, 0.99346),
    Case(convolutional.transposed_grouped, IMAGE, {"channels": (4, 3, 2)}, 0.99352),
    Case(convolutional.instance_norm, IMAGE, {"channels": (12, 8, 6)}, 0.99824),
    Case(convolutional.single_output, IMAGE, {"channels": (8, 6)}, 0.99451),
    Case(convolutional.frozen_batch_norm, IMAGE, {"channels": (12,)}, 0.98969),
    Case(convolutional.flattened, IMAGE, {"channels": (8,), "ffn": (20,)}, 0.99828),
    Case(
        convolutional.linear_to_image, ((2, 6),), {"channels": (10, 8)}, 0.99806, same_class=False
    ),
    Case(
        convolutional.hrnet,
        IMAGE,
        {"channels": (8, 12, 8, 8, 12, 12, 10), "layers": (2, 2)},
        0.99964,
        same_class=False,
    ),
    Case(
        convolutional.diffusion_unet,
        ((2, 3, 8, 8), (2,), (2, 5, 10)),
        {
            "ffn": (12, 4, 12, 24),
            "channels": (2, 2, 4, 2, 2, 4, 4, 4, 4, 16, 4, 2, 4, 2),
            "hidden": (16,),
            "kv_heads": (4, 4),
            "qk_dim": (4, 4),
            "v_dim": (4, 4),
        },
        0.99987,
        same_class=False,
    ),
    Case(plain.input_residual, ((2, 5, 12),), {"ffn": (30,)}, 0.95420),
    Case(plain.fused_gate, SEQUENCE, {"hidden": (12,), "ffn": (20,)}, 0.99654),
    Case(plain.glu, SEQUENCE, {"ffn": (12,)}, 0.98824),
    Case(
        plain.qkv_thd,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,)},
        0.99869,
        same_class=False,
    ),
    Case(
        plain.qkv_htd,
        SEQUENCE,
        {"hidden": (20,), "v_dim": (6,), "kv_heads": (4,), "qk_dim": (6,)},
        0.99869,
        same_class=False,
    ),
    Case(
        plain.qkv_htd_indexed,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,)},
        0.99869,
        same_class=False,
    ),
    Case(
        plain.qkv_hdt,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,)},
        0.99869,
        same_class=False,
    ),
    Case(
        plain.qkv_indexed,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,)},
        0.99869,
        same_class=False,
    ),
    Case(
        plain.qkv_split,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "v_dim": (6,), "qk_dim": (6,)},
        0.99869,
        same_class=False,
    ),
    Case(
        plain.qkv_sliced,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "v_dim": (6,), "qk_dim": (6,)},
        0.99869,
        same_class=False,
    ),
    Case(
        plain.attention_einsum,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,), "v_dim": (6,)},
        0.99867,
        same_class=False,
    ),
    Case(
        plain.attention_flat_batch,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,), "v_dim": (6,)},
        0.99867,
        same_class=False,
    ),
    Case(
        plain.attention_grouped,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (2,), "query_heads": (2,), "qk_dim": (6,), "v_dim": (6,)},
        0.99829,
        same_class=False,
    ),
    Case(
        plain.attention_grouped_interleave,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (2,), "query_heads": (2,), "qk_dim": (6,), "v_dim": (6,)},
        0.99829,
        same_class=False,
    ),
    Case(
        plain.attention_grouped_kernel,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (2,), "query_heads": (2,), "qk_dim": (6,), "v_dim": (6,)},
        0.99829,
        same_class=False,
    ),
    Case(
        plain.attention_rotary,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (3,), "v_dim": (6,)},
        0.99867,
        same_class=False,
    ),
    Case(
        plain.attention_cosine,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,), "v_dim": (6,)},
        0.99867,
        same_class=False,
    ),
    Case(
        plain.attention_channels,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "ffn": (6,), "qk_dim": (6,)},
        0.99867,
        same_class=False,
    ),
    Case(
        plain.attention_linear,
        SEQUENCE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,), "v_dim": (6,)},
        0.99867,
        same_class=False,
    ),
    Case(
        plain.multihead,
        SEQUENCE,
        {"hidden": (24,), "kv_heads": (4, 4), "qk_dim": (6, 6), "v_dim": (6,)},
        0.99931,
        same_class=False,
    ),
    Case(
        plain.multihead_weights,
        SEQUENCE,
        {"hidden": (24,), "kv_heads": (4, 4), "qk_dim": (6, 6), "v_dim": (6,)},
        0.99931,
        same_class=False,
    ),
    Case(
        plain.encoder_post_norm,
        SEQUENCE,
        {"hidden": (24,), "kv_heads": (4, 4), "qk_dim": (6, 6), "ffn": (32, 32), "layers": (2,)},
        0.99965,
        same_class=False,
    ),
    Case(
        plain.encoder_pre_norm,
        SEQUENCE,
        {"hidden": (24,), "kv_heads": (4, 4), "qk_dim": (6, 6), "ffn": (32, 32), "layers": (2,)},
        0.99965,
        same_class=False,
    ),
    Case(
        plain.encoder_decoder,
        ((2, 5, 8), (2, 4, 8)),
        {"hidden": (16,), "kv_heads": (4, 4, 4), "qk_dim": (4, 4, 4), "ffn": (24, 24)},
        0.99945,
        same_class=False,
    ),
    Case(plain.permuted, SEQUENCE, {"ffn": (12,)}, 0.99010, same_class=False),
    Case(plain.reused, SEQUENCE, {"ffn": (12, 10)}, 0.99452),
    Case(
        plain.tied,
        ids(30),
        {"hidden": (16,), "ffn": (20,)},
        1.00000,
        {"embed.weight:0": "indexed by values from outside (embedding at plain.py"},
    ),
    Case(
        plain.raw_parameters,
        SEQUENCE,
        {"ffn": (12, 10, 10)},
        1.00000,
        {"stacked:0": "a single index is taken (select at plain.py"},
    ),
    Case(plain.frozen_layers, SEQUENCE, {"ffn": (20, 16)}, 0.99471),
    Case(plain.dict_output, SEQUENCE, {"ffn": (20,)}, 0.98246),
    Case(plain.wide_deep, SEQUENCE, {"latent": (6,), "ffn": (20, 10)}, 0.99783),
    Case(
        plain.mlp_mixer,
        SEQUENCE,
        {"hidden": (12,), "ffn": (14, 14, 18, 18), "layers": (2,)},
        0.99125,
        same_class=False,
    ),
    Case(
        plain.vision_transformer,
        IMAGE,
        {"hidden": (20,), "kv_heads": (4,), "qk_dim": (6,), "ffn": (30,)},
        0.99933,
        {"position:1": "spatial (conv2d at plain.py"},
        same_class=False,
    ),
    Case(
        plain.patch_merging,
        IMAGE,
        {"kv_heads": (3,), "hidden": (12,), "qk_dim": (4,), "ffn": (10,)},
        0.99771,
        {"table:0": "indexed by values from outside (index at plain.py"},
        same_class=False,
    ),
    Case(
        plain.adaptive_norm,
        ((2, 5, 8), (2, 5)),
        {"hidden": (16,), "ffn": (16, 20), "kv_heads": (4,), "qk_dim": (6,)},
        0.99929,
        same_class=False,
    ),
    Case(plain.weight_norm, SEQUENCE, {"ffn": (20, 12)}, 0.99413),
    Case(plain.weight_norm_grouped, ((2, 3, 8),), {"channels": (4, 4)}, 0.98210),
    Case(plain.weight_norm_old, ((2, 3, 8),), {"channels": (4, 4)}, 0.98210),
    Case(plain.spectral_norm, IMAGE, {"channels": (12, 8)}, 0.99757),
    Case(plain.handmade_norms, SEQUENCE, {"hidden": (20,), "latent": (24,)}, 0.99763),
    Case(plain.constants, SEQUENCE, {"ffn": (12, 16)}, 0.99183, same_class=False),
    Case(plain.in_place, SEQUENCE, {"ffn": (6, 6), "latent": (6,)}, 0.99010, same_class=False),
    Case(plain.low_rank, SEQUENCE, {"ffn": (16, 6), "latent": (4,)}, 0.99834),
    Case(
        plain.embeddings,
        ids(20),
        {"hidden": (12,)},
        0.99482,
        {
            "words.weight:0": "indexed by values from outside (embedding at plain.py",
            "bag.weight:0": "indexed by values from outside (embedding_bag at plain.py",
            "positions.weight:0": "indexed by values from outside (embedding_1 at plain.py",
        },
    ),
    Case(recurrent.lstm, STEPS, {"ffn": (8,), "hidden": (6,)}, 0.98929),
    Case(recurrent.lstm_stacked, STEPS, {"ffn": (8,), "hidden": (6,)}, 0.99377),
    Case(recurrent.lstm_bidirectional, STEPS, {"ffn": (8,), "hidden": (6,)}, 0.99695),
    Case(recurrent.lstm_projected, STEPS, {"ffn": (8,), "hidden": (10, 6)}, 0.99644),
    Case(recurrent.gru, STEPS, {"ffn": (8,), "hidden": (6,)}, 0.98652),
    Case(recurrent.gru_stacked, STEPS, {"ffn": (8,), "hidden": (6,)}, 0.99642),
    Case(recurrent.rnn_tanh, STEPS, {"ffn": (8,), "hidden": (6,)}, 0.98099),
    Case(recurrent.rnn_relu, STEPS, {"ffn": (8,), "hidden": (6,)}, 0.98294),
    Case(recurrent.speech, ((2, 1, 8, 5),), {"channels": (6,), "hidden": (8,)}, 0.99668),
    Case(recurrent.sequence, ((2, 4, 5), (2, 3, 5)), {"hidden": (8,)}, 0.99696),
    Case(recurrent.cells, STEPS, {"hidden": (8, 6)}, 0.99620, same_class=False),
    Case(recurrent.gates, STEPS, {"ffn": (8,)}, 0.99408),
]
