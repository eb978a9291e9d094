"""A real GPU and a real model: the same masks and plans as on the processor, up to ties."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from graphprune.passes.masks import METHODS, method
from graphprune.quality.perplexity import perplexity
from graphprune.solvers import NM, Unstructured
from graphprune.streaming import text_windows
from models.cache import model_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

AGREEMENT = 0.995
"""Of the mask's bits: of two scores that are equal but for rounding, either may go."""

CLOSE = 0.003
"""Of the perplexity."""


@pytest.fixture(scope="module")
def smollm2():
    program = gp.load(str(model_path("smollm2")))
    return program, text_windows(program, count=16, length=256)


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_masks(smollm2, name, pattern):
    program, windows = smollm2
    wanted = gp.sparsify(program, windows, method(name, {}), pattern)
    with gp.on_device("cuda"):
        found = gp.sparsify(program, windows, method(name, {}), pattern)
    same = total = 0
    for here, there in zip(wanted.layers, found.layers, strict=True):
        assert there.removed == here.removed
        old, new = (one.program.weights[here.parameter] for one in (wanted, found))
        assert new.device.type == "cpu"
        same += int(((old != 0) == (new != 0)).sum())
        total += old.numel()
    assert same >= AGREEMENT * total
    assert _perplexity(found.program, windows) == pytest.approx(
        _perplexity(wanted.program, windows), rel=CLOSE
    )


def _perplexity(program, windows):
    slim = gp.apply(program, gp.Plan(program.fingerprint, {}))
    return perplexity(slim.module, windows[:8]).value


@pytest.mark.parametrize("score", ["taylor", "flap", "wanda-sp", "obs"])
def test_plans(smollm2, score):
    program, windows = smollm2
    options = {"remove": {"ffn": 0.25}, "score": score, "calibration": windows}
    wanted = gp.select(program, **options)
    with gp.on_device("cuda"):
        found = gp.select(program, **options)
    same = sum(len({*units} & {*found.kept_units[n]}) for n, units in wanted.kept_units.items())
    assert same >= AGREEMENT * sum(map(len, wanted.kept_units.values()))


def test_a_small_part_of_the_memory_is_enough(smollm2):
    program, windows = smollm2
    limit = 2 * 10**9
    torch.cuda.reset_peak_memory_stats()
    with gp.on_device("cuda", memory=limit):
        gp.sparsify(program, windows, method("sparsegpt", {}), Unstructured(0.5))
    assert torch.cuda.max_memory_reserved() <= limit
