"""Two processes train what one does, with zeros held on their shares."""

import json

import pytest
import torch
from safetensors.torch import load_file

from training.gloo import together
from training.nets import masks
from training.workers import held, train, two


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_equal_one(tmp_path, fsdp, kind):
    """Batches of 4, once as 2 + 2; the last one has 2 samples of 14."""
    options = {"train": kind, "loss": "kd+ce", "batch": 4, "lr": 1e-2, "precision": "float32"}
    options |= {"dropout": 0.0, "micro_batch": 2}
    together(two, tmp_path, {**options, "fsdp": fsdp})
    weights = load_file(tmp_path / "two.safetensors")
    losses, zeros, tokens = json.loads((tmp_path / "two.json").read_text())
    one = train({**options, "micro_batch": None})
    assert losses == pytest.approx(one.losses, abs=1e-6)
    assert tokens == one.tokens == 14 * 5
    assert weights.keys() == one.weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, one.weights[name], rtol=0, atol=1e-5)
        if name in masks():
            removed = ~masks()[name]
            assert not weight[removed].view(torch.int32).any()
            assert zeros[name] == int(removed.sum())


@pytest.mark.parametrize("given", ["before", "after"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_zeros_are_held_in_a_loop_of_ones_own(tmp_path, wrap, given):
    """Hooks on parameters are lost where FSDP exchanges these; masks are filled into its shares."""
    together(held, tmp_path, wrap, given)
    left, zeros = json.loads((tmp_path / "held.json").read_text())
    assert left == {"0.weight": 0, "2.weight": 0}
    assert zeros == {"0.weight": 281, "2.weight": 260}
