"""Scores and repairs on a device that refuses to meet the processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.passes.repair import REPAIRS
from graphprune.passes.repair.structured import obs
from graphprune.passes.scores import SCORES, get_score
from graphprune.passes.selection.select import select
from graphprune.passes.shared.score import Inputs
from placement.strict_device import strictly
from streaming.oracle import tokens, traced
from zoo import decoders, mixtures

_ROLES = {
    "block-influence": "layers",
    "loss-greedy": "layers",
    "span-influence": "layers",
    "reap": "experts",
}
"""Scores that judge one role only."""


def scored(name):
    """What a score says of a model's structures of a role that it judges."""
    role = _ROLES.get(name, "ffn")
    program, _ = traced(mixtures.mixtral if role == "experts" else decoders.llama_gqa_4)
    structures = [s for s in program.structures if s.role == role and s.prunable]
    assert structures
    return get_score(name).score(program, structures, Inputs(tokens(4)))


@pytest.mark.parametrize("name", SCORES.names())
def test_scores(name):
    wanted = scored(name)
    with strictly():
        found = scored(name)
    assert found.keys() == wanted.keys()
    for structure, values in found.items():
        assert type(values) is np.ndarray
        np.testing.assert_allclose(values, wanted[structure], rtol=1e-4)


def assert_same(wanted, found):
    """The same plan, weights and errors."""
    assert found.plan.kept_units == wanted.plan.kept_units
    assert [e.parameter for e in found.layers] == [e.parameter for e in wanted.layers]
    for here, there in zip(wanted.layers, found.layers, strict=True):
        assert there.error == pytest.approx(here.error, rel=1e-4, abs=1e-9)
    for name in wanted.program.trainable:
        old, new = (one.program.weights[name] for one in (wanted, found))
        assert type(new.data) is type(old.data)
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REPAIRS.names())
def test_repairs(name):
    program, _ = traced(decoders.llama_gqa_4)
    plan = select(program, remove={"ffn": 0.25, "heads": 0.5}, score="magnitude")
    options = {"epochs": 1} if name == "match" else {}
    repair = REPAIRS.build(name, options)
    wanted = repair.repair(program, tokens(6), plan)
    with strictly():
        found = repair.repair(program, tokens(6), plan)
    assert wanted.layers
    assert_same(wanted, found)


@pytest.mark.parametrize("role", ["ffn", "hidden", "v_dim"])
def test_surgery(role):
    program, _ = traced(decoders.llama_gqa_4)
    keep = {s.name: s.size // 2 for s in program.structures if s.role == role and s.prunable}
    assert keep
    wanted = obs(program, tokens(6), keep)
    with strictly():
        found = obs(program, tokens(6), keep)
    assert_same(wanted, found)


def test_surgery_of_experts():
    program, _ = traced(mixtures.mixtral)
    keep = {s.name: s.size // 2 for s in program.structures if s.role == "ffn" and s.prunable}
    wanted = obs(program, tokens(2, 3), keep)
    with strictly():
        found = obs(program, tokens(2, 3), keep)
    assert_same(wanted, found)
