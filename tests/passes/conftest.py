"""Small traced programs that the tests of this folder share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from graphprune.frontends.tracing.trace import trace
from graphprune.ir.torch.program import Program


def llama(
    hidden: int = 48, ffn: int = 80, heads: int = 6, kv: int = 2, layers: int = 3, tied: bool = True
) -> Program:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    return trace(model, kwargs={"input_ids": torch.randint(0, 96, (2, 7))})


class Convs(nn.Module):
    """A residual network with batch norm, and a flatten of 2 x 2 maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 40, 3, padding=1)
        self.narrow = nn.Conv2d(40, 16, 1)
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.narrow(torch.relu(self.wide(x)))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Mlp(nn.Module):
    def __init__(self, inner: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(5, inner)
        self.down = nn.Linear(inner, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def mlp(**changes: torch.Tensor) -> Program:
    """An MLP of ones, but for `changes` (``up_weight=...``)."""
    model = Mlp().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(changes.get(name.replace(".", "_"), torch.ones(())))
    return trace(model, (torch.randn(2, 5),))


@pytest.fixture(scope="session")
def gqa() -> Program:
    return llama()


@pytest.fixture(scope="session")
def convs() -> Program:
    torch.manual_seed(0)
    return trace(Convs().eval(), (torch.randn(2, 3, 8, 8),))


@pytest.fixture(scope="session")
def make_llama():
    return llama


@pytest.fixture(scope="session")
def make_mlp():
    return mlp
