"""A small net to train, with its data and masks."""

import functools

import torch
from torch import nn

import graphprune as gp


class Net(nn.Module):
    """A residual stack with tied ends."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 33), nn.SiLU(), nn.Linear(33, 16)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


@functools.cache
def program(dtype=torch.float32):
    return gp.trace(Net().to(dtype).eval(), (torch.randint(0, 40, (2, 6)),))


def data():
    return torch.randint(0, 40, (14, 6), generator=torch.Generator().manual_seed(1))


def labelled():
    """15 samples, whose counts of labels are 0 to 5."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 40, (15, 6), generator=generator)
    labels = ids.clone()
    for row in range(15):
        labels[row, row % 6 + 1 :] = -100
    return {"ids": ids, "labels": labels}


def masks():
    generator = torch.Generator().manual_seed(2)
    return {
        f"blocks.{i}.{j}.weight": torch.rand(shape, generator=generator) > 0.5
        for i in range(2)
        for j, shape in ((0, (33, 16)), (2, (16, 33)))
    }
