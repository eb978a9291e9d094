"""Processes that share the samples find what one finds alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ranks.workers import masks, shared
from training.gloo import together


def check(folder, world, work, *args):
    """Compare what processes find with what this one does; every one of them has the same."""
    together(shared, folder, work, *args, world=world)
    alone = work(*args)
    first = load_file(folder / "0.safetensors")
    for rank in range(1, world):
        other = load_file(folder / f"{rank}.safetensors")
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    assert first.keys() == alone.keys()
    for name, own in alone.items():
        found = first[name]
        if name.startswith("plan."):
            assert torch.equal(found, own), name
            continue
        assert torch.equal(found != 0, own != 0), name
        distance = float((found.double() - own.double()).norm())
        assert distance <= 1e-5 * float(own.double().norm()), name
    return alone


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("samples", "count"),
    [("windows", 7), ("windows", 1), ("ragged", 5)],
)
def test_masks_of_shared_samples(tmp_path, world, samples, count):
    check(tmp_path, world, masks, "llama", samples, count)
