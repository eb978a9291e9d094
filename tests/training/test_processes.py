"""Two processes train what one does, with zeros held on their shares."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from graphprune.training import Training, recover
from graphprune.training.core.processes import processes
from training.gloo import together
from training.nets import data, masks, program

NET = program()


def train(options):
    return recover(NET, data(), Training(**options), masks=masks(), teacher=NET)


def two(folder, options):
    """What a process of two does: train, and let the first one write what came out."""
    assert processes().world == 2
    found = train(options)
    if dist.get_rank() == 0:
        save_file(dict(found.weights), folder / "two.safetensors")
        numbers = found.losses, found.zeros, found.tokens
        (folder / "two.json").write_text(json.dumps(numbers))


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
