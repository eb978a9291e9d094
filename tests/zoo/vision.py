"""Vision transformers of transformers and two by hand, small and with random weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL))


def deit():
    """Two heads, of the class token and of the distillation token."""
    return hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SMALL))


def dinov2():
    config = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return hf.Dinov2ForImageClassification(config)


def swin(version: int = 1) -> hf.PreTrainedModel:
    kinds: tuple[Any, Any] = (
        (hf.SwinConfig, hf.SwinForImageClassification)
        if version == 1
        else (hf.Swinv2Config, hf.Swinv2ForImageClassification)
    )
    kind, model = kinds
    config = kind(
        image_size=16, patch_size=2, embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=4
    )
    swin_model: hf.PreTrainedModel = model(config)
    return swin_model


def swin_v2():
    return swin(2)


def convnext():
    config = hf.ConvNextConfig(hidden_sizes=[8, 12], depths=[2, 2], num_stages=2, image_size=32)
    return hf.ConvNextForImageClassification(config)


def segformer():
    config = hf.SegformerConfig(
        hidden_sizes=[16, 32],
        depths=[2, 2],
        num_attention_heads=[2, 4],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        strides=[4, 2],
        patch_sizes=[7, 3],
        mlp_ratios=[2, 2],
        decoder_hidden_size=24,
        image_size=32,
        num_labels=5,
    )
    return hf.SegformerForSemanticSegmentation(config)


def clip():
    text = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "vocab_size": 96,
        "max_position_embeddings": 16,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=20))


def sam():
    """Decomposed relative positions, windows, a global layer."""
    config = hf.SamVisionConfig(
        hidden_size=32,
        output_channels=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=48,
        num_pos_feats=6,
    )
    return hf.SamVisionModel(config)


def detr():
    """A backbone with frozen batch statistics, learned queries, cross-attention."""
    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[12, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=6,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        num_labels=5,
    )
    return hf.DetrForObjectDetection(config)


class DiTBlock(nn.Module):
    """adaLN-Zero: one linear layer gives shift, scale and gate of both branches."""

    def __init__(self, width, heads, ffn):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None]
        b, n, w = y.shape
        q, k, v = self.qkv(y).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)
        x = x + gate1[:, None] * self.proj(y)
        y = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2[:, None] * self.fc2(F.gelu(self.fc1(y), approximate="tanh"))


class DiT(nn.Module):
    """A diffusion transformer: patches in, patches out, conditioned on time and class."""

    def __init__(self, width=32, heads=4, ffn=48, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 4, width))
        self.label = nn.Embedding(7, width)
        self.time = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads, ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, 4 * 4 * 3)

    def forward(self, x, t, y):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        angles = t[:, None] * torch.exp(-torch.arange(5) / 5)
        c = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1)) + self.label(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        x = self.out(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(x.shape[0], 2, 2, 4, 4, 3)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 3, 8, 8)


def dit():
    return DiT()
