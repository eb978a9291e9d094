"""What processes of their own do with a module that was pruned."""

import torch
import torch.distributed as dist
from torch import nn

import graphprune as gp


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
