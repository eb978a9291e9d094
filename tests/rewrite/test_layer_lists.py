"""Configs that say things layer by layer: as lists, by number, and through a view."""

import pytest
import torch
import transformers
from transformers import (
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from graphprune.checkpoints.patch import Patch, apply_patch, named_tensors
from graphprune.rewrite.config.config import cut_layers, solve_config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def shapes_of(model_class, config):
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in named_tensors(model_class(config))}


def nemotron(kinds):
    return NemotronHConfig(**SIZES, head_dim=8, layers_block_type=kinds, mamba_num_heads=16,
                           mamba_head_dim=4, ssm_state_size=8, n_groups=2)  # fmt: skip


def test_layers_that_only_a_list_counts():
    kinds = ["mlp", "full_attention", "mlp", "mlp", "full_attention"]
    config, smaller = nemotron(kinds), nemotron([kinds[0], *kinds[2:]])
    assert "num_hidden_layers" not in config.to_dict()
    wanted = shapes_of(NemotronHForCausalLM, smaller)
    assert cut_layers(config, NemotronHForCausalLM, {"model.layers": [1]}) == {
        "layers_block_type": ["mlp", "mlp", "mlp", "full_attention"]
    }
    solved = solve_config(config, NemotronHForCausalLM, wanted, {"model.layers": [1]}, {})
    assert (solved.problems, solved.dropped) == ((), {})
    assert shapes_of(NemotronHForCausalLM, solved.config) == wanted


def test_a_count_that_something_else_equals():
    """Four layers, four heads and four kinds: only the list is about layers."""
    config = nemotron(["mlp", "full_attention", "mlp", "full_attention"])
    edits = cut_layers(config, NemotronHForCausalLM, {"model.layers": [0]})
    assert edits == {"layers_block_type": ["full_attention", "mlp", "full_attention"]}


def test_layers_named_by_number():
    config = Qwen3MoeConfig(
        **SIZES, head_dim=8, num_hidden_layers=5, mlp_only_layers=[0, 3], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, eos_token_id=[1, 2],
    )  # fmt: skip
    edits = cut_layers(config, Qwen3MoeForCausalLM, {"model.layers": [1]})
    assert (edits["num_hidden_layers"], edits["mlp_only_layers"]) == (4, [0, 2])
    assert "eos_token_id" not in edits
    edits = cut_layers(config, Qwen3MoeForCausalLM, {"model.layers": [0, 4]})
    assert (edits["num_hidden_layers"], edits["mlp_only_layers"]) == (3, [2])


def gemma(**changed):
    fields = {
        **SIZES, "num_hidden_layers": 6, "head_dim": 8, "global_head_dim": 16,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }  # fmt: skip
    return transformers.Gemma4TextConfig(**{**fields, **changed})


@pytest.mark.skipif(
    not hasattr(transformers.PreTrainedConfig, "per_layer_config"),
    reason="this transformers has no view of a config by layer",
)
class TestViews:
    def test_values_of_layers_are_renumbered(self):
        config = gemma(hidden_size_per_layer_input=0)  # whose table would have to shrink, too
        edits = cut_layers(config, transformers.Gemma4ForCausalLM, {"model.layers": [0, 1]})
        assert edits["num_hidden_layers"] == 4
        assert {int(k): v for k, v in edits["per_layer_config"].items()} == {
            1: {"head_dim": 16},
            3: {"head_dim": 16},
        }

    def test_values_of_layers_are_set_as_one(self):
        """`*=0.5` on such a model: the view has no attribute ``1`` to set a head size of."""
        config, model_class = gemma(), transformers.Gemma4ForCausalLM
        smaller = gemma(intermediate_size=24, head_dim=4, global_head_dim=8)
        wanted = shapes_of(model_class, smaller)
        hints = {"model": [(48, 24), (8, 4), (16, 8)]}
        solved = solve_config(config, model_class, wanted, {}, hints)
        assert not solved.problems
        assert shapes_of(model_class, solved.config) == wanted
        with torch.device("meta"):
            module = model_class(config)
        apply_patch(module, Patch(config=solved.edits))
        heads = [part.head_dim for part in module.config.per_layer_config]
        assert heads == [part.head_dim for part in smaller.per_layer_config] == [4, 8] * 3


def test_the_reason_is_the_plan_s():
    """Four layers and a head size that becomes half: nothing is said of the number of layers."""
    config = SmolLM3Config(
        **{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4},
        num_hidden_layers=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    wanted = shapes_of(SmolLM3ForCausalLM, config)  # heads of size 4
    for name, shape in wanted.items():
        if "q_proj" in name or "k_proj" in name:
            wanted[name] = (shape[0] // 2, shape[1])
    hints = {"model.layers.0.self_attn": [(4, 2), (32, 16), (16, 8)]}
    solved = solve_config(config, SmolLM3ForCausalLM, wanted, {}, hints)
    text = "\n".join(solved.problems)
    assert "num_hidden_layers" not in text
    assert "layer_types" not in text
    assert "_proj.weight" in solved.problems[0]
