"""The config solver, against configs written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from graphprune.checkpoints.patch import named_tensors
from graphprune.rewrite.config.config import cut_layers, solve_config

DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": 128,
}
GPT2: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}
T5: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "vocab_size": 128,
}


def shapes_of(model_class, config):
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in named_tensors(model_class(config))}


WIDTH = [(64, 48)]
HEADS = [(8, 6), (4, 3), (128, 96), (64, 48)]
CASES = [
    # class, config class, original fields, changed fields, dropped layers, hints
    pytest.param(
        LlamaForCausalLM,
        LlamaConfig,
        DECODER,
        {"hidden_size": 48, "intermediate_size": 72},
        {},
        WIDTH,
        id="explicit head size",  # 64 positions are no width
    ),
    pytest.param(
        LlamaForCausalLM,
        LlamaConfig,
        DECODER,
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "num_hidden_layers": 2,
        },
        {"model.layers": [1, 2]},
        HEADS,
        id="heads with key-value heads",
    ),
    pytest.param(
        Qwen3ForCausalLM,
        Qwen3Config,
        DECODER,
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention"] * 3,
        },
        {"model.layers": [0]},
        [],  # the sizes of parameters alone must do
        id="no hints",
    ),
    pytest.param(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            **DECODER,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
        {
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        {"model.layers": [0, 3]},
        [],
        id="layer types",
    ),
    pytest.param(
        GPT2LMHeadModel,
        GPT2Config,
        GPT2,
        {"n_inner": 192, "n_layer": 2},
        {"transformer.h": [1]},
        [(256, 192)],
        id="a field that was left unset",
    ),
    pytest.param(
        Qwen2ForCausalLM,
        Qwen2Config,
        {k: v for k, v in DECODER.items() if k != "head_dim"},
        {"hidden_size": 48, "head_dim": 8},
        {},
        WIDTH,
        id="a field that the class lacks and the model reads",
    ),
    pytest.param(
        T5ForConditionalGeneration,
        T5Config,
        T5,
        {"num_heads": 3, "d_ff": 80, "num_layers": 2},
        {"encoder.block": [1]},
        [(4, 3), (64, 48)],
        id="encoder layers only",
    ),
    pytest.param(
        ResNetForImageClassification,
        ResNetConfig,
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 2, 3, 1],
            "layer_type": "basic",
        },
        {"hidden_sizes": [16, 24, 40, 64], "depths": [1, 2, 2, 1]},
        {"resnet.encoder.stages.2.layers": [1]},
        [(32, 24), (48, 40)],
        id="lists of sizes and depths",
    ),
]


@pytest.mark.parametrize(
    ("model_class", "config_class", "fields", "changes", "dropped", "pairs"), CASES
)
def test_solved(model_class, config_class, fields, changes, dropped, pairs):
    config = config_class(**fields)
    expected = config_class(**{**fields, **changes})
    shapes = shapes_of(model_class, expected)
    before = config.to_dict()
    solved = solve_config(config, model_class, shapes, dropped, {"somewhere": pairs})
    assert solved.problems == ()
    assert solved.config.to_dict() == expected.to_dict()
    assert solved.edits == changes
    assert solved.builds < 100  # each builds the class on the meta device
    assert config.to_dict() == before


def test_sub_configs():
    text = {**DECODER, "model_type": "llama"}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    expected = LlavaConfig(
        text_config={**text, "intermediate_size": 80, "num_hidden_layers": 3},
        vision_config={**vision, "intermediate_size": 88},
        image_token_index=5,
    )
    solved = solve_config(
        config,
        LlavaForConditionalGeneration,
        shapes_of(LlavaForConditionalGeneration, expected),
        {"model.language_model.layers": [2]},
        {"text": [(96, 80)], "vision": [(96, 88)]},
    )
    assert solved.problems == ()
    assert solved.edits == {
        "text_config.intermediate_size": 80,
        "text_config.num_hidden_layers": 3,
        "vision_config.intermediate_size": 88,
    }


@pytest.mark.parametrize(
    ("model_class", "config_class", "fields", "changes", "unseen"),
    [
        (
            GPT2LMHeadModel,
            GPT2Config,
            {**GPT2, "n_inner": 96},
            {"n_embd": 48, "n_head": 3, "n_inner": 72},
            {"n_head"},
        ),
        (
            BertModel,
            BertConfig,
            BERT,
            {"hidden_size": 48, "num_attention_heads": 3},
            {"num_attention_heads"},
        ),
    ],
)
def test_fields_that_no_shape_shows(model_class, config_class, fields, changes, unseen):
    config = config_class(**fields)
    expected = config_class(**{**fields, **changes})
    hints = {"attention": [(4, 3), (64, 48)]}
    solved = solve_config(config, model_class, shapes_of(model_class, expected), {}, hints)
    assert solved.problems == ()
    assert solved.edits == {k: v for k, v in changes.items() if k not in unseen}
    assert unseen <= {path[-1] for path in solved.alternatives}
    # The fewest changes come first; one of the candidates is the whole truth.
    candidates = [candidate.to_dict() for candidate in solved.candidates()]
    assert candidates[0] == solved.config.to_dict()
    assert expected.to_dict() in candidates


def with_shapes(model_class, config, changes):
    """The shapes of a config's model with some replaced; keys end names, in all layers."""
    shapes = shapes_of(model_class, config)
    for end, shape in changes.items():
        shapes.update({name: shape for name in shapes if name.endswith(end)})
    return shapes


def test_layers_that_differ():
    config = LlamaConfig(**DECODER)
    shapes = with_shapes(LlamaForCausalLM, config, {"mlp.up_proj.weight": (80, 64)})
    shapes["model.layers.2.mlp.up_proj.weight"] = (72, 64)
    solved = solve_config(config, LlamaForCausalLM, shapes, {}, {})
    assert solved.problems == (
        "model.layers.*.mlp.up_proj.weight differs over layers: layers 0, 1, 3: (80, 64), "
        "layer 2: (72, 64); LlamaConfig has one value for all layers",
    )
    assert solved.config.to_dict() == config.to_dict()
    assert solved.edits == {}
    assert solved.builds == 1  # said at once


def test_heads_without_head_size():
    config = BertConfig(**BERT)
    shapes = with_shapes(
        BertModel,
        config,
        {
            **{f"self.{n}.weight": (32, 64) for n in ("query", "key", "value")},
            **{f"self.{n}.bias": (32,) for n in ("query", "key", "value")},
            "attention.output.dense.weight": (64, 32),
        },
    )
    hints = {"attention": [(4, 2), (64, 32)]}
    solved = solve_config(config, BertModel, shapes, {"encoder.layer": []}, hints)
    assert solved.problems[0] == (
        "encoder.layer.*.attention.self.query.weight: wanted (32, 64), the nearest native config "
        "gives (64, 64); dimension 0 follows hidden_size, which other parameters need as it is"
    )
    assert len(solved.problems) == 7


def test_validation_messages_are_passed_on():
    config = LlamaConfig(**{**DECODER, "num_key_value_heads": 8})
    shapes = with_shapes(
        LlamaForCausalLM,
        config,
        {
            **{f"self_attn.{n}_proj.weight": (96, 64) for n in "qkv"},
            "self_attn.o_proj.weight": (64, 96),
        },
    )
    solved = solve_config(config, LlamaForCausalLM, shapes, {}, {"a": [(8, 6), (128, 96)]})
    assert (
        "The hidden size (64) is not a multiple of the number of attention heads (6)"
        in (solved.problems[0])
    )


def test_layers_stay_cut_where_the_rest_cannot_be_expressed():
    config = LlamaConfig(**DECODER)
    smaller = LlamaConfig(**{**DECODER, "num_hidden_layers": 3})
    shapes = with_shapes(LlamaForCausalLM, smaller, {})
    shapes["model.layers.1.mlp.up_proj.weight"] = (72, 64)
    solved = solve_config(config, LlamaForCausalLM, shapes, {"model.layers": [1]}, {})
    assert solved.problems
    assert solved.config.num_hidden_layers == 3
    assert (solved.edits, solved.dropped) == ({"num_hidden_layers": 3}, {})


def test_stacks_that_no_field_counts():
    config = ResNetConfig(depths=[1, 1, 1, 1], layer_type="basic")
    shapes = shapes_of(ResNetForImageClassification, config)
    stack = "resnet.encoder.stages.0.layers.0.layer"
    solved = solve_config(config, ResNetForImageClassification, shapes, {stack: [1]}, {})
    assert solved.problems == (f"no field of ResNetConfig counts the layers of '{stack}'",)
    assert solved.dropped == {stack: [1]}


def test_cut_layers():
    config = Qwen3Config(**DECODER)
    assert cut_layers(config, Qwen3ForCausalLM, {"model.layers": [1, 3]}) == {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
    }
    assert cut_layers(config, Qwen3ForCausalLM, {}) == {}
