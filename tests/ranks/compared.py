"""Comparing what processes have found with what one has found alone."""

from __future__ import annotations

import torch
from safetensors.torch import load_file


def compare(folder, world, job, alone):
    """Every process has the same, and to 1e-5 what one has; the same plan, and the same zeros.

    Args:
        folder: with a file of each process.
        world: how many there are.
        job: what they did.
        alone: tensors by name, or the folder with the file of one process.
    """
    first, *others = (load_file(folder / f"{job}-{rank}.safetensors") for rank in range(world))
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    wanted = alone if isinstance(alone, dict) else load_file(alone / f"{job}-0.safetensors")
    assert first.keys() == wanted.keys()
    for name, own in wanted.items():
        if name.startswith("plan "):
            assert torch.equal(first[name], own), name
            continue
        assert torch.equal(first[name] != 0, own != 0), name
        distance = float((first[name].double() - own.double()).norm())
        assert distance <= 1e-5 * float(own.double().norm()), name
