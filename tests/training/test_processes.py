"""Two processes train what one does, with zeros held on their shares."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graphprune.training import Training, hold, recover
from graphprune.training.core.processes import full, processes
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


def held(folder, wrap, given):
    """What a process of two does with a loop of its own."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 33), nn.SiLU(), nn.Linear(33, 16))
    masks = {}
    for name, zeros in (("0.weight", 281), ("2.weight", 260)):
        size = module.get_parameter(name).detach().abs()
        masks[name] = size > size.flatten().kthvalue(zeros).values
    before = hold(module, masks) if given == "before" else None
    called = module
    if wrap == "fsdp":
        for part in (module[0], module[2], module):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    else:
        called = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    handle = before or hold(module, masks, optimizer)
    for step in range(7):  # two of which accumulate, and the last is left over
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        called(x).square().mean().backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    handle.check()
    optimizer.step()
    handle.check()
    whole = {n: full(module.get_parameter(n)) for n in masks}
    if dist.get_rank() == 0:
        found = {n: w[~masks[n]].view(torch.int32).count_nonzero().item() for n, w in whole.items()}
        zeros = {n: w.numel() - w.count_nonzero().item() for n, w in whole.items()}
        (folder / "held.json").write_text(json.dumps([found, zeros]))


@pytest.mark.parametrize("given", ["before", "after"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_zeros_are_held_in_a_loop_of_ones_own(tmp_path, wrap, given):
    """Hooks on parameters are lost where FSDP exchanges these; masks are filled into its shares."""
    together(held, tmp_path, wrap, given)
    left, zeros = json.loads((tmp_path / "held.json").read_text())
    assert left == {"0.weight": 0, "2.weight": 0}
    assert zeros == {"0.weight": 281, "2.weight": 260}
