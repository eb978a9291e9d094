"""Sizes that a call repeats though its operands have them: a slim model's are other ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

import graphprune as gp
from graphprune.frontends.hf.load import trace_model
from zoo.case import check, prunable_sizes, randomise
from zoo.pretrained import randomised

# Functions of values [batch, n], and of n, which they write into calls.
SIZED = {
    "output_size": lambda h, n: h.repeat_interleave(3, dim=1, output_size=3 * n),
    "output_size_backwards": lambda h, n: h.repeat_interleave(3, dim=-1, output_size=3 * n),
    "output_size_alone": lambda h, n: torch.repeat_interleave(
        h[:, :, None], 2, 1, output_size=2 * n
    ).flatten(1),
    "unflatten": lambda h, n: h.unflatten(-1, (n, 1)).flatten(1),
    "view": lambda h, n: (h.view(-1, 1, n) * 2).view(-1, n),
    "reshape": lambda h, n: h.reshape(len(h), n, 1).mul(2).reshape(-1, n),
    "expand": lambda h, n: h[:, :, None].expand(-1, n, 3).reshape(-1, 3 * n),
    "expand_copy": lambda h, n: torch.expand_copy(h[:, :, None], (4, n, 3)).flatten(1),
    "broadcast_to": lambda h, n: h[:, None].broadcast_to(4, 3, n).flatten(1),
    "view_copy": lambda h, n: torch.view_copy(h, (4, n, 1)).flatten(1),
    "repeat": lambda h, n: h.repeat(1, 2).view(-1, 2, n).flatten(1),
    "tile": lambda h, n: torch.tile(h, (1, 2)).view(-1, 2 * n),
    "split_with_sizes": lambda h, n: torch.cat(h.repeat(1, 2).split_with_sizes([n, n], 1)[::-1], 1),
    "split_with_sizes_copy": lambda h, n: torch.cat(
        torch.ops.aten.split_with_sizes_copy(h.repeat(1, 2), [n, n], 1)[::-1], 1
    ),
    "tensor_split": lambda h, n: torch.cat(torch.tensor_split(h.repeat(1, 2), [n], 1)[::-1], 1),
    "slice_copy": lambda h, n: torch.slice_copy(h.repeat(1, 2), 1, n, 2 * n),
    "narrow": lambda h, n: h.repeat(1, 2).narrow(1, n, n),
    "zeros": lambda h, n: h + torch.zeros(4, n),
    "full": lambda h, n: h * torch.full((n,), 2.0),
    "new_ones": lambda h, n: h + h.new_ones(n),
    "new_full": lambda h, n: h * h.new_full((1, n), 3.0),
    "empty": lambda h, n: torch.empty(4, n).copy_(h) * 2,
    "layer_norm": lambda h, n: F.layer_norm(h, (n,)),
    "rms_norm": lambda h, n: F.rms_norm(h, (n,)),
    "one_hot": lambda h, n: F.one_hot(h.argmax(1), n) * h,
    "scatter": lambda h, n: torch.zeros(4, n).scatter(1, h.argmax(1, keepdim=True), 2.0) * h,
    "roll": lambda h, n: torch.roll(h.repeat(1, 2), n, 1),
    "pad": lambda h, n: F.pad(h, (0, n))[:, :n] + h,
    "interpolate": lambda h, n: F.interpolate(h[:, :, None], size=4).sum(-1),
    "adaptive_pool": lambda h, n: F.adaptive_avg_pool1d(h.view(4, n, 1).repeat(1, 1, 3), 2).sum(-1),
    "fold": lambda h, n: F.fold(
        h.view(4, n, 1).repeat_interleave(2, 1), output_size=(1, 2), kernel_size=(1, 2)
    ).sum((-1, -2)),
    "pixel_shuffle": lambda h, n: F.pixel_shuffle(
        h.view(4, n, 1, 1).repeat_interleave(4, 1), 2
    ).sum((-1, -2)),
}


class Sized(nn.Module):
    """Two linear layers around a function that knows the width between them."""

    def __init__(self, function, inner=8):
        super().__init__()
        self.function, self.inner = function, inner
        outer = function(torch.randn(4, inner), inner).shape[1]
        self.one, self.two = nn.Linear(5, inner), nn.Linear(outer, 3)

    def forward(self, x):
        return self.two(self.function(F.relu(self.one(x)), self.inner))


@pytest.mark.parametrize("name", SIZED)
def test_sizes_in_calls(name):
    function = SIZED[name]
    module = randomise(Sized(function))
    x = torch.randn(4, 5)
    program = gp.trace(module, (x,), dynamic_shapes={"x": None})
    (structure,) = (s for s in program.structures if ("one.weight", 0) in s.members)
    rows = (0, 2, 3, 6)
    plan = gp.Plan(program.fingerprint, {structure.name: rows}, {structure.name: 8})
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim).raise_if_failed()
    kept = plan.kept(program)
    rows, columns = kept["one.weight"][0], kept["two.weight"][1]
    narrow = F.relu(F.linear(x, module.one.weight[rows], module.one.bias[rows]))
    wanted = F.linear(function(narrow, 4), module.two.weight[:, columns], module.two.bias)
    torch.testing.assert_close(slim.exported.module()(x), wanted)
    torch.testing.assert_close(slim.module(x), wanted)


def test_sizes_of_strides_are_frozen():
    program = gp.trace(
        randomise(Sized(lambda h, n: h.as_strided((4, n), (n, 1)) * 2)), (torch.randn(4, 5),)
    )
    assert "as_strided" in program.frozen()["one.weight", 0]


COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_d_head": 8,
         "mamba_chunk_size": 8}  # fmt: skip


def bamba():
    config = hf.BambaConfig(**COMMON, **MAMBA, num_hidden_layers=1, attn_layer_indices=[])
    return hf.BambaForCausalLM(config)


def falcon_h1():
    config = hf.FalconH1Config(
        **COMMON, **MAMBA, num_hidden_layers=1, mamba_d_ssm=64, head_dim=8
    )  # fmt: skip
    return hf.FalconH1ForCausalLM(config)


def granite_hybrid():
    config = hf.GraniteMoeHybridConfig(
        **COMMON, **MAMBA, num_hidden_layers=1, layer_types=["mamba"], num_local_experts=0,
        shared_intermediate_size=48,
    )  # fmt: skip
    return hf.GraniteMoeHybridForCausalLM(config)


@pytest.mark.slow  # torch takes half a minute to trace one state space layer
@pytest.mark.parametrize("build", [bamba, falcon_h1, granite_hybrid], ids=lambda b: b.__name__)
def test_heads_of_state_spaces(build):
    program = trace_model(randomised(build()))
    assert not program.typing.opaque
    heads = {r: s for r, s in prunable_sizes(program).items() if r.endswith("heads")}
    assert 2 in heads["kv_heads"]  # the groups of the state space
    check(program, {"kv_heads": 0.5, "query_heads": 0.5})
