"""Two processes prune what one does."""

import pytest
import torch
from safetensors.torch import load_file

from graphprune import Plan
from loraprune.workers import prune, two
from training.gloo import together


@pytest.mark.parametrize("gradient", ["adapters", "weight"])
def test_two_processes_remove_the_same_units_as_one(tmp_path, gradient):
    """By gradients of all samples, of which each process has some; counts of labels differ."""
    one = prune(gradient)
    together(two, tmp_path, gradient)
    assert one.plan.kept_units
    assert [Plan.load(tmp_path / f"plan-{rank}.json") for rank in range(2)] == [one.plan] * 2
    for name, weight in load_file(tmp_path / "two.safetensors").items():
        torch.testing.assert_close(weight, one.program.weights[name].detach(), rtol=0, atol=1e-9)
