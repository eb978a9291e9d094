"""Plain PyTorch modules: every prunable role alone and all together, judged by the oracle."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from zoo import convolutional, plain, recurrent
from zoo.case import check, prunable_fraction, prunable_sizes, randomise

# Model: shape of the input, number of prunable structures by role, the least part of the
# parameters that some plan can remove.
EXPECTED = {
    convolutional.resnet_basic: ((2, 3, 16, 16), {"channels": 5, "layers": 1}, 0.997),
    convolutional.resnet_padded: ((2, 3, 16, 16), {"channels": 6, "layers": 1}, 0.997),
    convolutional.resnet_bottleneck: ((2, 3, 16, 16), {"channels": 6, "layers": 1}, 0.994),
    convolutional.resnext: ((2, 3, 16, 16), {"channels": 8, "layers": 1}, 0.995),
    convolutional.mobilenet: ((2, 3, 16, 16), {"channels": 8, "ffn": 1, "layers": 1}, 0.997),
    convolutional.efficientnet: ((2, 3, 16, 16), {"channels": 8, "ffn": 1, "layers": 1}, 0.997),
    convolutional.mobilenet_v2: ((2, 3, 16, 16), {"channels": 5, "ffn": 1, "layers": 1}, 0.996),
    convolutional.densenet: ((2, 3, 16, 16), {"channels": 12}, 0.997),
    convolutional.unet_batch_norm: ((2, 3, 16, 16), {"channels": 12}, 0.998),
    convolutional.unet_group_norm: ((2, 3, 16, 16), {"channels": 22}, 0.998),
    convolutional.shufflenet: ((2, 3, 16, 16), {"channels": 8}, 0.751),
    convolutional.shufflenet_grouped: ((2, 3, 16, 16), {"channels": 1}, 0.688),
    convolutional.inception: ((2, 3, 16, 16), {"channels": 15}, 0.996),
    convolutional.yolo_c2f: ((2, 3, 16, 16), {"channels": 13, "layers": 1}, 0.995),
    convolutional.yolo_implicit: ((2, 3, 16, 16), {"channels": 2}, 0.990),
    convolutional.pixel_shuffle: ((2, 3, 16, 16), {"channels": 3}, 0.996),
    convolutional.space_to_depth: ((2, 3, 16, 16), {"channels": 2}, 0.993),
    convolutional.depth_multiplier: ((2, 3, 16, 16), {"channels": 2}, 0.991),
    convolutional.transposed_grouped: ((2, 3, 16, 16), {"channels": 3}, 0.992),
    convolutional.instance_norm: ((2, 3, 16, 16), {"channels": 3}, 0.996),
    convolutional.single_output: ((2, 3, 16, 16), {"channels": 2}, 0.993),
    convolutional.frozen_batch_norm: ((2, 3, 16, 16), {"channels": 1}, 0.988),
    convolutional.hrnet: ((2, 3, 16, 16), {"channels": 7, "layers": 2}, 0.998),
    plain.input_residual: ((2, 12), {"ffn": 1}, 0.952),
    plain.fused_gate: ((2, 6, 8), {"hidden": 1, "ffn": 1}, 0.995),
    plain.glu: ((2, 6, 8), {"ffn": 1}, 0.986),
    plain.qkv_thd: ((2, 6, 8), {"hidden": 1, "kv_heads": 1, "qk_dim": 1}, 0.997),
    plain.qkv_htd: ((2, 6, 8), {"hidden": 1, "v_dim": 1, "kv_heads": 1, "qk_dim": 1}, 0.997),
    plain.qkv_htd_indexed: ((2, 6, 8), {"hidden": 1, "kv_heads": 1, "qk_dim": 1}, 0.997),
    plain.qkv_hdt: ((2, 6, 8), {"hidden": 1, "kv_heads": 1, "qk_dim": 1}, 0.997),
    plain.qkv_indexed: ((2, 6, 8), {"hidden": 1, "kv_heads": 1, "qk_dim": 1}, 0.997),
    plain.qkv_split: ((2, 6, 8), {"hidden": 1, "kv_heads": 1, "v_dim": 1, "qk_dim": 1}, 0.997),
    plain.qkv_sliced: ((2, 6, 8), {"hidden": 1, "kv_heads": 1, "v_dim": 1, "qk_dim": 1}, 0.997),
    plain.attention_einsum: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "qk_dim": 1, "v_dim": 1},
        0.997,
    ),
    plain.attention_flat_batch: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "qk_dim": 1, "v_dim": 1},
        0.997,
    ),
    plain.attention_grouped: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "query_heads": 1, "qk_dim": 1, "v_dim": 1},
        0.996,
    ),
    plain.attention_grouped_interleave: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "query_heads": 1, "qk_dim": 1, "v_dim": 1},
        0.996,
    ),
    plain.attention_grouped_kernel: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "query_heads": 1, "qk_dim": 1, "v_dim": 1},
        0.996,
    ),
    plain.attention_rotary: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "qk_dim": 1, "v_dim": 1},
        0.997,
    ),
    plain.attention_cosine: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "qk_dim": 1, "v_dim": 1},
        0.997,
    ),
    plain.attention_channels: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "ffn": 1, "qk_dim": 1},
        0.997,
    ),
    plain.attention_linear: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 1, "qk_dim": 1, "v_dim": 1},
        0.997,
    ),
    plain.multihead: ((2, 6, 8), {"hidden": 1, "kv_heads": 2, "qk_dim": 2, "v_dim": 1}, 0.997),
    plain.multihead_weights: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 2, "qk_dim": 2, "v_dim": 1},
        0.997,
    ),
    plain.encoder_post_norm: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 2, "qk_dim": 2, "ffn": 2, "layers": 1},
        0.998,
    ),
    plain.encoder_pre_norm: (
        (2, 6, 8),
        {"hidden": 1, "kv_heads": 2, "qk_dim": 2, "ffn": 2, "layers": 1},
        0.998,
    ),
    plain.permuted: ((2, 6, 8), {"ffn": 1}, 0.988),
    plain.reused: ((2, 6, 8), {"ffn": 2}, 0.993),
    plain.raw_parameters: ((2, 6, 8), {"ffn": 3}, 0.998),
    plain.frozen_layers: ((2, 6, 8), {"ffn": 2}, 0.993),
    plain.dict_output: ((2, 6, 8), {"ffn": 1}, 0.980),
    plain.wide_deep: ((2, 6, 8), {"latent": 1, "ffn": 2}, 0.996),
    plain.patch_merging: (
        (2, 3, 16, 16),
        {"kv_heads": 1, "hidden": 1, "qk_dim": 1, "ffn": 1},
        0.996,
    ),
    plain.weight_norm: ((2, 6, 8), {"ffn": 2}, 0.992),
    plain.spectral_norm: ((2, 3, 16, 16), {"channels": 2}, 0.996),
    plain.constants: ((2, 6, 8), {"ffn": 2}, 0.990),
    plain.in_place: ((2, 6, 8), {"ffn": 2, "latent": 1}, 0.988),
    plain.low_rank: ((2, 6, 8), {"ffn": 2, "latent": 1}, 0.996),
    recurrent.lstm: ((2, 6, 5), {"ffn": 1, "hidden": 1}, 0.987),
    recurrent.lstm_stacked: ((2, 6, 5), {"ffn": 1, "hidden": 1}, 0.992),
    recurrent.lstm_bidirectional: ((2, 6, 5), {"ffn": 1, "hidden": 1}, 0.995),
    recurrent.lstm_projected: ((2, 6, 5), {"ffn": 1, "hidden": 2}, 0.994),
    recurrent.gru: ((2, 6, 5), {"ffn": 1, "hidden": 1}, 0.985),
    recurrent.gru_stacked: ((2, 6, 5), {"ffn": 1, "hidden": 1}, 0.994),
    recurrent.rnn_tanh: ((2, 6, 5), {"ffn": 1, "hidden": 1}, 0.979),
    recurrent.rnn_relu: ((2, 6, 5), {"ffn": 1, "hidden": 1}, 0.981),
    recurrent.cells: ((2, 6, 5), {"hidden": 2}, 0.994),
    recurrent.gates: ((2, 6, 5), {"ffn": 1}, 0.992),
}


@pytest.mark.parametrize("build", EXPECTED, ids=lambda f: f.__name__)
def test_module(build):
    shape, structures, fraction = EXPECTED[build]
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    program = gp.trace(randomise(build()), (image,))
    found = prunable_sizes(program)
    assert {role: len(sizes) for role, sizes in found.items()} == structures
    assert prunable_fraction(program) >= fraction
    if len(found) > 1:
        for role in found:
            check(program, {role: 0.5})
    check(program, dict.fromkeys(found, 0.5))
