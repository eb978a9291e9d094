"""What processes of their own do with modules that are or were pruned."""

import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import graphprune as gp
from graphprune.integrations.sparse_output import write_sparse
from graphprune.training import GradualPruner, GradualPruning
from graphprune.training.core.processes import full
from graphprune.training.schedule.text import from_text, to_text

STEPS = 20


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def distributed(folder):
    """Train it in DDP, each process on half of each batch."""
    slim = gp.prune(Net(), (torch.zeros(2, 8),), remove={"ffn": 0.5})
    wrapped = nn.parallel.DistributedDataParallel(slim)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        half = x[8 * dist.get_rank() :][:8]
        (wrapped(half) - half[:, :4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        torch.save(slim.state_dict(), folder / "weights.pt")


def batch(step):
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


def loss_of(module, x):
    return (module(x) - x[:, :4]).square().mean()


def train(module, called, options, part=slice(None)):
    """Prune in the course of training; after each step every zero is one."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    pruner = GradualPruner(module, options, optimizer)
    for step in range(1, STEPS + 1):
        loss_of(called, batch(step)[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.update(step, STEPS)
        pruner.check()
    return pruner.finish()


def gradual(folder, wrap, scope):
    """Prune in DDP or FSDP2, each process on half of each batch, and write."""
    module = called = Net()
    if wrap == "fsdp":
        for part in (module.first, module.second, module):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    else:
        called = nn.parallel.DistributedDataParallel(module)
    start = 8 * dist.get_rank()
    options = GradualPruning(sparsity=0.6, every=2, scope=scope)
    pruned = train(module, called, options, slice(start, start + 8))
    masks = {n: m.int() for n, m in pruned.masks.items()}
    for mask in masks.values():  # the same everywhere
        other = mask.clone()
        dist.broadcast(other, 0)
        assert torch.equal(mask, other)
    write_sparse(folder / "sparse", module, pruned, first=dist.get_rank() == 0)
    weights = {n: full(p) for n, p in module.named_parameters()}
    if dist.get_rank() == 0:
        torch.save([masks, weights, pruned.events], folder / "found.pt")


def checkpoint(folder):
    """Prune a model of transformers in FSDP2, with its state told as JSON in between, and write."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    for part in (*module.model.layers, module):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    pruner = GradualPruner(module, GradualPruning(sparsity=0.6), optimizer)
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in range(1, 11):
        module(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.update(step, 10)
        if step == 6:
            state = pruner.state_dict()
            again = json.loads(json.dumps(to_text(state, module)))
            pruner.load_state_dict(from_text(again, module))
            assert all(
                torch.equal(m, state["masks"][n]) for n, m in pruner.state_dict()["masks"].items()
            )
    pruned = pruner.finish()
    write_sparse(folder / "sparse", module, pruned, first=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        torch.save({n: m.int() for n, m in pruned.masks.items()}, folder / "masks.pt")
