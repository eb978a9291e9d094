"""Masks on a device that refuses to meet the processor: every method, and what goes with them."""

from __future__ import annotations

import pytest
import torch

from graphprune.passes.masks import ALLOCATIONS, METHODS, SparseGPT, allocation, method
from graphprune.passes.masks.oneshot import sparsify
from graphprune.solvers import NM, Unstructured
from graphprune.streaming import Held
from placement.strict_device import strictly
from streaming.oracle import tokens, traced
from zoo import decoders, mixtures

HALF = Unstructured(0.5)

_FEWER = {"alps": {"steps": 24, "refits": 3}}
"""Options that save time: each operator of the device goes through Python."""


def fewer(name):
    """A method with these options."""
    return method(name, _FEWER.get(name, {}))


def assert_same(program, data, solver, pattern, **options):
    """The same masks, errors and weights on both, and everything on the processor at the end."""
    wanted = sparsify(program, data, solver, pattern, errors=True, **options)
    with strictly():
        found = sparsify(program, data, solver, pattern, errors=True, **options)
    assert [e.parameter for e in found.layers] == [e.parameter for e in wanted.layers]
    for here, there in zip(wanted.layers, found.layers, strict=True):
        assert (there.removed, there.zeros, there.notes) == (here.removed, here.zeros, here.notes)
        assert there.error == pytest.approx(here.error, rel=0.01, abs=1e-9)
        old, new = (one.program.weights[here.parameter] for one in (wanted, found))
        assert type(new) is type(old)
        assert new.device.type == "cpu"
        assert torch.equal(new == 0, old == 0)
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
def test_methods(name, pattern):
    program, _ = traced(decoders.llama_gqa_4)
    assert_same(program, tokens(), fewer(name), pattern)


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_allocations(name):
    program, _ = traced(decoders.llama_gqa_4)
    assert_same(program, tokens(), SparseGPT(), HALF, budget=allocation(name, {}))


@pytest.mark.parametrize("name", METHODS.names())
def test_experts(name):
    program, _ = traced(mixtures.mixtral)
    assert_same(program, tokens(), fewer(name), HALF)


@pytest.mark.parametrize(
    ("solver", "pattern", "options"),
    [
        (SparseGPT(bits=4), HALF, {}),
        (SparseGPT(), HALF, {"reference": True}),
        (SparseGPT(), HALF, {"keep_zeros": True}),
        (SparseGPT(), HALF, {"held": Held(torch.bfloat16)}),
        (method("ria", {"permute": True}), NM(2, 4), {}),
        (fewer("alps"), HALF, {"reference": True}),
    ],
    ids=["bits", "reference", "keep_zeros", "held", "permute", "alps-reference"],
)
def test_options(solver, pattern, options):
    program, _ = traced(decoders.llama_gqa_4)
    assert_same(program, tokens(), solver, pattern, **options)
