"""What the original code of LLM-Shearing computes otherwise, by numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.training.gates.concrete import begun
from graphprune.training.gates.expected import saved_share
from graphprune.training.model.adapters import Draw
from training.gates.models import gated_of, lay, structures_of

X, HEAD = [2.0, -1.0, 0.5, 1.0], [[1.0, 2.0, -1.0, 0.5], [0.5, -1.0, 1.0, 2.0]]


class Stream(nn.Module):
    """A residual stream of four channels that a head reads behind a norm."""

    def __init__(self, norm: nn.Module, x: list[float], head: list[list[float]], tied: bool):
        super().__init__()
        self.embed, self.norm = nn.Embedding(len(head), 4), norm
        self.head = nn.Linear(4, len(head), bias=False)
        self.mix = nn.Linear(4, 4, bias=False)  # of its own, where the head is tied
        with torch.no_grad():
            self.mix.weight.zero_()
            self.head.weight.copy_(torch.tensor(head))
            self.embed.weight.copy_(torch.tensor([x] * len(head)))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        out: torch.Tensor = self.head(self.norm(x + self.mix(x)))
        return out


def rms(weight: list[float], eps: float) -> nn.RMSNorm:
    norm = nn.RMSNorm(4, eps=eps)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weight))
    return norm


def laid(module: nn.Module):
    program = gp.trace(module.eval(), (torch.zeros(1, 1, dtype=torch.int64),))
    (stream,) = [s for s in structures_of(program) if s.size == 4]
    return stream.name, lay(program, [stream])


def run(program, weights):
    """The graph with weights, by plain PyTorch."""
    module = program.exported.module()
    with torch.no_grad():
        for name, weight in weights.items():
            module.get_parameter(name).copy_(weight)
        return module(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("tied", [False, True])
def test_a_gate_of_the_stream_is_folded_once(tied):
    """Folded into the norm and the head, as the original does, the logits are 13 % off."""
    name, one = laid(Stream(rms([1.0, 0.5, 2.0, 1.0], 0.0), X, HEAD, tied))
    z = torch.tensor([0.9, 0.7, 1.0, 0.8])
    (gated,) = one.outputs({name: z})
    if not tied:
        assert gated.flatten().tolist() == pytest.approx([0.4, 3.08], abs=1e-6)
    folded = one.folded({name: z})
    names = one.program.trainable - set(one.program.aliases)
    slim = run(one.program, {n: folded.weights[n] for n in names})
    assert slim.flatten().tolist() == pytest.approx(gated.flatten().tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("norm", "right"),
    [
        (rms([1.0, 2.0, 0.5, 3.0], 1e-5), [0.848528, 0, 0.565685, 0]),
        (nn.LayerNorm(4, eps=1e-5), [-0.99998, 0, 0.99998, 0]),
    ],
)
def test_norms_are_over_open_channels(norm, right):
    name, one = laid(Stream(norm, [3.0, 7.0, 4.0, -9.0], torch.eye(4).tolist(), tied=False))
    (found,) = one.outputs({name: torch.tensor([1.0, 0.0, 1.0, 0.0])})
    assert found.flatten().tolist() == pytest.approx(right, abs=1e-5)


def test_the_expected_size_is_a_product_of_nested_shares():
    """With the locations of all gates at 0, 83 % of each axis are expected to be open."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    program = gp.trace(model, kwargs={"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
    chosen = gated_of(structures_of(program, "hidden", "kv_heads", "ffn", "layers"))
    gates = begun(chosen, 0, Draw(), by_score=False)
    with torch.no_grad():
        for a in gates.locations.values():
            a.zero_()
    saved = saved_share(program, gates.gated, gates.chances, "params")
    q = 0.831822
    blocks = 94299.94
    right = blocks + 4 * 2 * 64 * q**2 + (2 * 32 + 1) * 64 * q
    dense = 163840 + 4 * 2 * 64 + (2 * 32 + 1) * 64
    assert float((1 - saved.detach()) * dense) == pytest.approx(right, rel=1e-5)
    saved.backward()
    assert all(bool((a.grad < 0).all()) for a in gates.locations.values())
