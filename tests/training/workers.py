"""What processes of their own do in tests of training."""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graphprune.training import Saving, Training, hold, recover
from graphprune.training import state as states
from graphprune.training.core.processes import full, processes
from graphprune.training.core.samples import Tensors
from training.nets import data, labelled, masks, program


def train(options, **given):
    """Train the net, with its masks, as it is its own teacher."""
    net = program()
    given = {"masks": masks(), "teacher": net, **given}
    return recover(net, data(), Training(**options), **given)


def train_wide(options):
    """Train the net in float64, on samples of which some have more labels than others."""
    net = program(torch.float64)
    return recover(net, labelled(), Training(**options), masks=masks(), teacher=net)


def two(folder, options, work=train):
    """What a process of two does: train, and let the first one write what came out."""
    assert processes().world == 2
    found = work(options)
    if dist.get_rank() == 0:
        save_file(dict(found.weights), folder / "two.safetensors")
        numbers = found.losses, found.zeros, found.tokens
        (folder / "two.json").write_text(json.dumps(numbers))


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


def die(folder, options, number, at, where):
    """Train, until a signal comes in a step, after it or in its saving."""

    def strike(step, place):
        if step == at and place == where:
            os.kill(os.getpid(), number)

    def save(tensors, path, metadata=None):
        strike(int(path.parent.parent.parent.name.removeprefix("step-")), "saving")
        written(tensors, path, metadata)

    def told(now):
        strike(now.step, "stepped")
        step[0] = now.step + 1

    def take(samples, numbers):
        strike(step[0], "computing")
        return taken(samples, numbers)

    written, states.save_file = states.save_file, save
    step, taken = [1], Tensors.take
    Tensors.take = take
    train(options, state=Saving(folder, every=1), progress=told)


def learn_together(folder):
    """Learn gates; each process leaves them and the weights."""
    made = learned()
    weights = {name: weight.detach() for name, weight in made.program.weights.items()}
    torch.save({**made.gates, **weights}, folder / f"{dist.get_rank()}.pt")


def learned(micro_batch=1):
    """Gates of a small net with its weights, on samples of which some have more labels.

    Each micro-batch has noise of its own: they are as large on any number of processes.
    """
    from graphprune.training.learn import learn

    options = Training(steps=4, batch=4, lr=1e-3, micro_batch=micro_batch)
    return learn(program(torch.float64), labelled(), _halves(), options)


def grasp_together(folder):
    """Choose units by gates; each process leaves them and the weights."""
    made = grasped(micro_batch=1)
    weights = {name: weight.detach() for name, weight in made.program.weights.items()}
    torch.save({**made.gates, **weights}, folder / f"{dist.get_rank()}.pt")


def grasped(micro_batch=None):
    """Units of a small net that gates choose while its weights stay."""
    from graphprune.training.grasp import grasp

    options = Training(steps=8, batch=4, micro_batch=micro_batch)
    return grasp(program(torch.float64), labelled(), _halves(), options)


def deal_together(folder, exhausted):
    """Train on domains whose shares change; each process leaves shares and weights."""
    torch.save(dealt(exhausted, micro_batch=1), folder / f"{dist.get_rank()}.pt")


def dealt(exhausted, micro_batch=None):
    """Weights and shares after a training on two domains, one of which runs out."""
    from graphprune.training.dynamic import DynamicBatches

    noise = torch.Generator().manual_seed(5)
    domains = {
        "low": torch.randint(0, 20, (5, 6), generator=noise),
        "high": torch.randint(20, 40, (30, 6), generator=noise),
    }
    held_out = {name: windows[:3] for name, windows in domains.items()}
    aims = {"low": 1.0, "high": 4.0}
    mixed = DynamicBatches(domains, held_out, aims, every=2, exhausted=exhausted)
    options = Training(steps=6, batch=4, lr=1e-3, micro_batch=micro_batch)
    found = recover(program(torch.float64), mixed.data, options, callbacks=(mixed,))
    shares = {f"share/{m.step}": torch.tensor([*m.shares.values()]) for m in mixed.history}
    seen = {"seen": mixed.tensors()["seen"].double()}
    return {**found.weights, **shares, **seen}


def _halves():
    import numpy as np

    from graphprune.training.gates.gates import Gated

    found = [s for s in program(torch.float64).structures if s.prunable]
    return [Gated(s, 1, s.size // 2, np.arange(s.size)) for s in found]
