"""A model of residual blocks that can be computed by hand, and what is to be seen in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphprune as gp

WIDTH, INNER = 6, 10


class Block(nn.Module):
    """Two linear layers beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Straight(nn.Module):
    """A single matrix beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x)


class Net(nn.Module):
    """Blocks and a head."""

    def __init__(self, kind: type[nn.Module] = Block, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stream(x))

    def stream(self, x: Tensor, layers: int | None = None) -> Tensor:
        """What the residual stream holds after some layers."""
        for layer in self.layers[:layers]:
            x = layer(x)
        return x


def net(kind: type[nn.Module] = Block, layers: int = 3) -> Net:
    """The model, with weights at random."""
    torch.manual_seed(0)
    return Net(kind, layers).eval()


def windows(count: int = 16, length: int = 20) -> list[Tensor]:
    """Samples, those of two calls of one count alike."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, length, WIDTH, generator=generator) for _ in range(count)]


def halves(program: gp.Program) -> gp.Plan:
    """A plan for half of the inner width of every block."""
    kept = {s.name: (0, 2, 3, 5, 7) for s in program.structures if s.role == "ffn"}
    return gp.Plan(program.fingerprint, kept, dict.fromkeys(kept, INNER))


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The mean over tokens of squared distances in units of squares, in float64."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    tokens = [((a - b).square().sum(-1) / b.square().sum(-1)).flatten() for a, b in pairs]
    return float(torch.cat(tokens).mean().detach())
