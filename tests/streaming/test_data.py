"""Samples in every form, and programs with new weights."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graphprune as gp
from graphprune.errors import LoadError, PlanError
from graphprune.plan.plan import Plan
from graphprune.streaming import (
    apply_weights,
    batches,
    find_sites,
    stream,
    text_windows,
)
from streaming.oracle import Halving, tokens, traced
from zoo import decoders, encoders
from zoo.case import randomise


def test_token_windows_in_batches():
    program = traced(decoders.llama_gqa_4)[0]
    ids = tokens(5)
    made = batches(program, ids, 2)
    assert [(b.first, b.count) for b in made] == [(0, 2), (2, 2), (4, 1)]
    assert torch.equal(torch.cat([b.kwargs["input_ids"] for b in made]), ids)
    again = batches(program, lambda: ids, 2)
    assert all(torch.equal(a.kwargs["input_ids"], b.kwargs["input_ids"])
               for a, b in zip(made, again, strict=True))  # fmt: skip


def test_constant_inputs_are_stretched():
    program = traced(encoders.bert)[0]
    (made,) = batches(program, tokens(2, 9), 2)
    assert torch.equal(made.kwargs["attention_mask"], torch.ones(2, 9, dtype=torch.int64))
    with pytest.raises(PlanError, match="don't determine all inputs"):
        batches(traced(encoders.t5)[0], tokens(2, 9))


def test_images_and_sequences_of_samples():
    program = gp.trace(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))),
                       (torch.zeros(2, 3, 8, 8),))  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    made = batches(program, x, 3)
    assert [b.count for b in made] == [3, 1]
    assert torch.equal(made[0].args[0], x[:3])
    for data in ([x[:1], x[1:]], [(x[:1],), (x[1:],)], iter([x[:1], x[1:]])):
        made = batches(program, data)
        assert [(b.first, b.count) for b in made] == [(0, 1), (1, 3)]
        assert torch.equal(made[1].args[0], x[1:])
    with pytest.raises(PlanError, match="the shape that the model was traced with") as caught:
        batches(program, [x[:1], x[:1, :2]])
    assert "sample 1" in str(caught.value)
    with pytest.raises(PlanError, match="no calibration data"):
        batches(program, [])
    with pytest.raises(PlanError, match="is no calibration data"):
        batches(program, 3)


def test_mappings_are_checked():
    program = traced(encoders.t5)[0]
    ids = tokens(2, 9)
    with pytest.raises(PlanError, match="don't have the inputs") as caught:
        batches(program, {"input_ids": ids, "labels": ids})
    assert "it lacks attention_mask, decoder_input_ids; it doesn't take labels" in str(caught.value)
    with pytest.raises(PlanError, match="different numbers of samples"):
        batches(program, {"input_ids": ids, "attention_mask": ids[:1]})
    mask = torch.ones_like(ids)
    data = {"input_ids": ids, "attention_mask": mask[:, :4], "decoder_input_ids": ids}
    with pytest.raises(PlanError, match="shape of its input"):
        batches(program, data)


def test_default_window():
    assert traced(decoders.llama_gqa_4)[0].default_window() == 64
    assert gp.trace(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),)).default_window() == 2048
    program = traced(decoders.gpt2)[0]
    assert program.default_window() == 64
    long = copy.deepcopy(program.source.config)
    long.max_position_embeddings = 131072
    assert replace(program, source=replace(program.source, config=long)).default_window() == 2048
    with pytest.raises(LoadError, match="text needs a tokenizer"):
        text_windows(program)


def halved(program):
    return stream(program, find_sites(program), batches(program, tokens()), Halving())


def test_a_program_with_new_weights_computes_with_them_and_saves_them(tmp_path):
    program = traced(decoders.gpt2)[0]
    ids = tokens(2)
    before = program.module(input_ids=ids).logits
    new = halved(program)
    pruned = apply_weights(program, new)
    assert torch.equal(program.module(input_ids=ids).logits, before)
    after = pruned.module(input_ids=ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    assert pruned.fingerprint == program.fingerprint
    slim = gp.apply(pruned, Plan(pruned.fingerprint, {}))
    torch.testing.assert_close(slim.exported.module()(input_ids=ids).logits, after)
    slim.save(tmp_path / "out", "hf")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in new.items():
        assert torch.equal(saved[name], weight)
        assert 0.4 < (saved[name] == 0).float().mean() < 0.6
    own = next(n for n in saved if n not in new and saved[n].dim() == 1)
    assert torch.equal(saved[own], program.weights[own].detach())


def test_unknown_weights_are_refused():
    program = traced(decoders.llama_gqa_4)[0]
    with pytest.raises(PlanError, match="no weight 'nothing'"):
        apply_weights(program, {"nothing": torch.zeros(1)})
    with pytest.raises(PlanError, match="another shape"):
        apply_weights(program, {"lm_head.weight": torch.zeros(1)})
    with pytest.raises(PlanError, match="no weight"):
        apply_weights(traced(decoders.llama_tied)[0], {"lm_head.weight": torch.zeros(96, 32)})


def test_the_example_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text(encoding="utf-8")
    _, code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    program = traced(decoders.llama_gqa_4)[0]
    halved = names["halve"](program, tokens())
    for layer, share in ((0, 0.5), (1, 0.0)):
        weight = halved.weights[f"model.layers.{layer}.mlp.up_proj.weight"]
        assert (weight == 0).float().mean() == share


@pytest.mark.parametrize(
    ("count", "length", "sizes"),
    [
        (64, 8, [4] * 16),  # at least sixteen batches
        (320, 128, [16] * 20),  # of 2048 tokens
        (300, 128, [15] * 20),  # all of one size
        (67, 128, [1] * 67),
        (3, 8, [1] * 3),
        (40, 600, [2] * 20),
        (32, 2048, [1] * 32),
    ],
)
def test_short_windows_go_through_together(count, length, sizes):
    program, _ = traced(decoders.llama_gqa_4)
    given = torch.zeros(count, length, dtype=torch.int64)
    for data in (given, {"input_ids": given}, lambda: given):
        found = batches(program, data)
        assert [b.count for b in found] == sizes
        assert [b.first for b in found] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert next(b.count for b in batches(program, given, 2)) == min(2, count)


def test_images_and_fixed_batches_go_one_by_one():
    images = torch.randn(40, 3, 8, 8)
    program = gp.trace(nn.Conv2d(3, 4, 3).eval(), (images[:2],))
    assert [b.count for b in batches(program, images)] == [1] * 40
    fixed = gp.trace(nn.Embedding(9, 4).eval(), (torch.zeros(1, 8, dtype=torch.int64),))
    tokens_ = torch.zeros(64, 8, dtype=torch.int64)
    assert next(b.count for b in batches(fixed, tokens_)) == 1
