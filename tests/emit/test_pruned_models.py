"""Pruned transformers models: their modules, configs and checkpoints, opened by graphprune."""

from __future__ import annotations

import json

import pytest
import torch

import graphprune as gp
from graphprune.emit import hf, pruned
from graphprune.emit.hf import precheck
from zoo import decoders
from zoo.case import check
from zoo.pretrained import Pretrained


@pytest.fixture
def unopened(monkeypatch):
    """Save without opening the checkpoint in a process of its own."""
    monkeypatch.setattr(hf, "_reopen", lambda *_, **__: [])


def pruned_model(build, *roles):
    return check(Pretrained(build, {}, 0.0).trace(), dict.fromkeys(roles, 0.5))


def ids():
    return torch.arange(3, 25).reshape(2, 11)


def test_a_head_size_that_the_config_leaves_open():
    """32 = 4 * 8 becomes 16 = 2 * 8: the width stays, so the head size has to be written down."""
    slim = pruned_model(decoders.phi3, "kv_heads", "query_heads")
    assert precheck(slim) == []
    config = slim.module.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (1, 1)
    assert (config.hidden_size, config.head_dim) == (32, 8)


def test_buffers_that_nothing_reads_decide_nothing(tmp_path, unopened):
    """The original frequencies, kept for longer inputs, don't keep heads from being smaller."""
    slim = pruned_model(decoders.llama_gqa_4, "qk_dim", "v_dim")
    assert slim.idle_buffers == {"model.rotary_emb.original_inv_freq"}
    assert precheck(slim) == []
    slim.save(tmp_path / "out", format="hf")
    patch = json.loads((tmp_path / "out" / "config.json").read_text())["graphprune"]["patch"]
    assert patch["persistent"] == ["model.rotary_emb.inv_freq"]
    assert "shapes" not in patch


def test_sizes_that_fused_attention_does_not_read():
    """Queries for each key: without fused attention the keys are repeated as often."""
    slim = pruned_model(decoders.llama_gqa_4, "query_heads", "qk_dim", "v_dim")
    module = slim.module
    assert module.model.layers[0].self_attn.num_key_value_groups == 2
    with torch.no_grad():
        fused = module(ids()).logits
        module.set_attn_implementation("eager")
        torch.testing.assert_close(module(ids()).logits, fused, rtol=1e-4, atol=1e-5)
    gp.trace(module, (ids(),), {"use_cache": False})  # exporting repeats keys as well


def test_a_self_contained_checkpoint_is_opened(tmp_path, unopened):
    slim = pruned_model(decoders.gpt2, "ffn", "heads")
    slim.save(tmp_path / "out", format="hf")
    program = gp.load(tmp_path / "out")
    assert program.source is not None
    assert pruned.original_class(program.source.model_class).__name__ == "GPT2LMHeadModel"
    assert set(program.example[1]) == {"input_ids"}  # causal: no mask
    assert program.parameters["transformer.h.0.mlp.c_fc.weight"] == (32, 64)
    with torch.no_grad():
        found = program.exported.module()(input_ids=ids())
        wanted = slim.exported.module()(input_ids=ids())
    torch.testing.assert_close(found.logits, wanted.logits)
