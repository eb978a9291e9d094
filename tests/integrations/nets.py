"""A small network, and the same one with the units of a plan switched off by hand."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

HEADS, DIM, WIDTH, INNER, WORDS = 4, 8, 32, 48, 50


class Tagger(nn.Module):
    """One transformer layer with tied embeddings; an input has the name of a builtin."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input, scale):
        x = self.embed(input)
        b, s, _ = x.shape
        h = self.norm(x)
        q, k, v = (m(h).view(b, s, HEADS, DIM).transpose(1, 2) for m in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.o(attended.reshape(b, s, WIDTH))
        return self.head(x + self.down(F.relu_(self.up(x))) * scale)


def tagger():
    torch.manual_seed(0)
    module = Tagger().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2)
    return module


def inputs(batch=2, length=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (batch, length), generator=generator)
    return tokens, torch.rand(batch, 1, 1, generator=generator)


def exported(module=None):
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length}, {0: batch})
    return torch.export.export(module or tagger(), inputs(), dynamic_shapes=shapes)


def switched_off(module, inner, heads):
    """The module at full size, with all but these inner channels and heads silent."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        channels = torch.ones(INNER, dtype=torch.bool)
        channels[list(inner)] = False
        module.down.weight[:, channels] = 0
        silent = torch.ones(HEADS, dtype=torch.bool)
        silent[list(heads)] = False
        module.o.weight[:, silent.repeat_interleave(DIM)] = 0
    return module
