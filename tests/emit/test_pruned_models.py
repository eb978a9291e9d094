"""Pruned transformers models: their modules, configs and checkpoints, opened by graphprune."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.checkpoints import self_contained as pruned
from graphprune.emit import hf
from graphprune.emit.expected import Expected
from graphprune.emit.hf import precheck
from graphprune.rewrite.config.config import SolvedConfig
from graphprune.rewrite.config.search import Verdict, best_first
from zoo import decoders, vision
from zoo.case import check
from zoo.pretrained import Pretrained


@pytest.fixture
def unopened(monkeypatch):
    """Save without opening the checkpoint in a process of its own."""
    monkeypatch.setattr(hf, "reopen", lambda *_, **__: [])


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


def test_an_error_that_looks_like_rounding():
    """The encoding of positions follows from the width: a part in ten thousand of the logits."""
    slim = pruned_model(vision.detr, "hidden")
    with pytest.warns(UserWarning, match="exported graph instead"):
        assert type(slim.module) is not type(slim.program.module)


def test_a_model_that_can_not_run(tmp_path, monkeypatch):
    """Kernels may refuse a size, such as rows that are no multiple of 16 bytes: no crash."""

    def refuse(*_):
        raise RuntimeError("strides should be multiple of 16 bytes")

    slim = pruned_model(decoders.gpt2, "ffn")
    monkeypatch.setattr(SolvedConfig, "candidates", lambda self: iter([self.config] * 2))
    monkeypatch.setattr(Expected, "deviation_of", refuse)
    monkeypatch.setattr(hf, "reopen", lambda *_, **__: ["not tried"])
    with pytest.raises(gp.EmitError) as caught:
        slim.save(tmp_path / "out", format="hf")
    assert "can't be loaded or run: strides should be multiple" in str(caught.value)


def test_search_is_not_led_astray_by_a_coincidence():
    """One wrong option gets further than the start does; the right ones are near the start."""
    right = (0, 1, 1, 0, 0)
    tried = []

    def evaluate(state):
        tried.append(state)
        cost = -7.0 if state[3] == 2 else -6.0
        return Verdict(state == right, cost, focus=(0, 1, 2, 3), later=(4,))

    assert best_first([2, 3, 3, 3, 9], evaluate, 64) == (right, True)
    assert len(tried) < 50


def test_code_that_names_a_dtype_keeps_its_class():
    """Its run in float64 raises, which says nothing of the module."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 4)
            self.outer = nn.Linear(12, 8)

        def forward(self, x):
            return self.inner(torch.relu(self.outer(x.float())))

    program = gp.trace(Named().eval(), (torch.randn(2, 12),))
    slim = gp.apply(program, gp.select(program, remove={"ffn": 0.5}))
    assert type(slim.module) is Named
    assert slim.module.outer.weight.shape == (4, 12)


def test_weights_that_make_much_of_rounding():
    """Differences of nearly equal units: the module is right, and as inexact as its graph."""

    class Differences(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = nn.Linear(12, 32, bias=False)
            self.inner = nn.Linear(32, 4, bias=False)

        def forward(self, x):
            return self.inner(torch.relu(self.outer(x)).to(torch.float32).to(x.dtype))

    torch.manual_seed(0)
    model = Differences().eval()
    with torch.no_grad():
        model.outer.weight[16:] = model.outer.weight[:16] + 1e-3 * torch.randn(16, 12)
        model.inner.weight[:, 16:] = -model.inner.weight[:, :16]
    program = gp.trace(model, (torch.randn(2, 12),))
    (structure,) = [s for s in program.structures if s.prunable]
    kept = tuple(i for i in range(32) if i % 16 < 8)
    slim = gp.apply(program, gp.Plan(program.fingerprint, {structure.name: kept}))
    assert type(slim.module) is Differences
