"""Small nets with factors that their code may take from a size, and a judge that cuts nothing."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp

WIDTH, HEADS = 32, 4


class Fused(nn.Module):
    """torch's own attention, whose factor follows the size of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Linear(8, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.end = nn.Linear(WIDTH, 3)

    def forward(self, x):
        h = self.begin(x)
        return self.end(self.attention(h, h, h, need_weights=False)[0] + h)


class Encoder(nn.Module):
    """The same inside of torch's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Linear(8, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True, dropout=0.0)
        self.end = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.end(self.layer(self.begin(x)))


class Attention(nn.Module):
    """Attention by hand; its factor is left to torch, kept as an attribute or read from a shape."""

    def __init__(self, factor: str) -> None:
        super().__init__()
        self.factor, self.heads, self.head_dim = factor, HEADS, WIDTH // HEADS
        self.begin = nn.Linear(8, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.end = nn.Linear(WIDTH, 3)

    def forward(self, x):
        h = self.begin(x)
        q, k, v = (
            m(h).view(*h.shape[:2], self.heads, -1).transpose(1, 2)
            for m in (self.q, self.k, self.v)
        )
        if self.factor == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            size = self.head_dim if self.factor == "attribute" else q.shape[-1]
            y = (q @ k.transpose(-1, -2) / math.sqrt(size)).softmax(-1) @ v
        return self.end(self.o(y.transpose(1, 2).flatten(2)) + h)


class Feature(nn.Module):
    """Two linear layers with something between them that may depend on their width."""

    def __init__(self, between, width=WIDTH) -> None:
        super().__init__()
        self.between, self.width = between, width
        self.one, self.two = nn.Linear(8, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.two(self.between(self, self.one(x).tanh()))


def small(module):
    """A net for inputs of size 100: on those of size one, its attention is uniform."""
    with torch.no_grad():
        for parameter in module.begin.parameters():
            parameter.mul_(0.01)
    return module.eval()


def pruned(module, x, role):
    """The program, and the slim model without a quarter of one role."""
    program = gp.trace(module, (x,))
    return gp.apply(program, gp.select(program, remove={role: 0.25}, score="random", seed=1))


def masked(slim):
    """The dense module in float64 with zeros where the plan cuts: no code of ours but the plan."""
    module = copy.deepcopy(slim.program.module).double()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, kept in slim.plan.kept(slim.program).items():
            if name in parameters:
                stays = torch.zeros(parameters[name].shape, dtype=torch.bool)
                stays[np.ix_(*kept)] = True
                parameters[name].mul_(stays)
    return module
