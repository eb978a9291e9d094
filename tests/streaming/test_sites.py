"""Which weights are found, how they are grouped, and why others are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.streaming import (
    Bank,
    Convolution,
    Experts,
    Matrix,
    batches,
    find_sites,
    in_streams,
    stream,
)
from streaming.oracle import Halving, traced
from zoo import convolutional, decoders, encoders, images, mixtures, sharing
from zoo.case import randomise


def program_of(module, *args):
    return gp.trace(randomise(module), args)


def layouts(sites):
    return {s.parameter: s.layout for s in sites.all.values()}


def test_nothing_to_treat_is_an_error():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(x))

    program = program_of(Normed(), torch.randn(2, 8))
    with pytest.raises(PlanError, match="there is no weight to treat") as caught:
        find_sites(program)
    assert "head.weight: its result is an output of the model" in str(caught.value)
    assert find_sites(program, include=["head.weight"]).parameters == ("head.weight",)
    for include, exclude in ((["head.*"], []), (["head.weight"], ["head.weight"])):
        with pytest.raises(PlanError, match="treat"):
            find_sites(program, include=include, exclude=exclude)


def test_globs_choose_and_must_match():
    program = traced(decoders.llama_gqa_4)[0]
    chosen = find_sites(program, include=["*.mlp.*"], exclude=["*.1.mlp.up*", "*down*"])
    assert chosen.parameters == (
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
    )
    assert chosen.skipped["model.layers.0.mlp.down_proj.weight"] == "excluded"
    assert chosen.skipped["model.layers.0.self_attn.q_proj.weight"] == "not included"
    for options in ({"include": ["*.typo"]}, {"exclude": ["*.typo"]}):
        with pytest.raises(PlanError, match="no parameter matches"):
            find_sites(program, **options)
    with pytest.raises(PlanError, match="is to be treated") as caught:
        find_sites(program, include=["model.embed_tokens.weight"])
    assert "embedding reads it too" in str(caught.value)


def test_an_embedding_that_is_the_output_layer_is_never_taken():
    program = traced(decoders.llama_tied)[0]
    assert "embedding reads it too" in find_sites(program).skipped["model.embed_tokens.weight"]
    with pytest.raises(PlanError, match="is to be treated"):
        find_sites(program, include=["lm_head.weight"])


def test_a_weight_that_two_modules_share_is_one():
    program = program_of(sharing.tied(), torch.zeros(2, 5, dtype=torch.long))
    sites = find_sites(program)
    shared = next(g for g in sites.groups if "blocks.0.up.weight" in g.parameters)
    assert [s.path for s in shared.sites] == ["blocks.0.up", "blocks.1.up"]
    assert "blocks.1.up.weight" not in sites.parameters
    only = find_sites(program, include=["blocks.1.up.weight"])
    assert only.parameters == ("blocks.0.up.weight",)


def test_layouts():
    assert set(layouts(find_sites(traced(decoders.gpt2)[0])).values()) == {
        Matrix(transposed=True),
    }
    mixtral = layouts(find_sites(traced(mixtures.mixtral)[0]))
    assert mixtral["model.layers.0.mlp.experts.down_proj"] == Experts(4, False, True)
    oss = layouts(find_sites(traced(mixtures.gpt_oss)[0]))
    assert oss["model.layers.0.mlp.experts.down_proj"] == Experts(4, True, False)
    whisper = layouts(find_sites(traced(encoders.whisper)[0]))
    assert whisper["model.encoder.conv2.weight"] == Convolution((3,), (2,), ((1, 1),), (1,), 1)


@pytest.mark.parametrize("build", [mixtures.qwen2_moe])
def test_routers_and_gates_are_left_alone(build):
    sites = find_sites(traced(build)[0])
    left = {n for n, why in sites.skipped.items() if why == "a router"}
    assert left
    assert all(n.endswith("mlp.gate.weight") for n in left)
    assert not any("shared_expert_gate" in n for n in sites.parameters)
    assert any("experts.gate_up_proj" in n for n in sites.parameters)
    narrowed = find_sites(traced(build)[0], include=["model.layers.0.mlp.*"])
    assert not left & set(narrowed.parameters)
    router = "model.layers.0.mlp.gate.weight"
    assert find_sites(traced(build)[0], include=[router]).parameters == (router,)
    shared = next(g for g in sites.groups if any("shared_expert" in p for p in g.parameters))
    assert len(shared.parameters) == 2  # gate and up of the shared expert


def test_depthwise_and_transposed_convolutions():
    sites = find_sites(program_of(convolutional.efficientnet(), torch.randn(2, 3, 16, 16)))
    depthwise = {n for n, why in sites.skipped.items() if why == "a depthwise convolution"}
    assert depthwise == {f"blocks.{i}.depthwise.0.weight" for i in range(3)}
    assert "blocks.0.se.fc1.weight" in sites.parameters
    program = program_of(images.transposed_grouped(), torch.randn(2, 3, 8, 8))
    with pytest.raises(PlanError, match="conv_transpose2d"):
        find_sites(program)


class Products(nn.Module):
    """Weights in all the places where a product can have them."""

    def __init__(self):
        super().__init__()
        sizes = {"right": (8, 6), "flipped": (6, 5), "left": (7, 4), "bank": (2, 5, 5)}
        sizes |= {"stacked": (2, 5, 5), "summed": (5, 5), "scaled": (5, 5), "last": (5, 3)}
        for name, shape in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x):  # [2, 4, 8]
        x = torch.relu(x @ self.right)
        x = torch.relu(x @ self.flipped.t().t())
        x = torch.relu(self.left @ x)  # [2, 7, 5]
        x = torch.relu(torch.bmm(x, self.bank))
        x = torch.relu(x @ self.stacked[0] + torch.einsum("bni,io->bno", x, self.summed))
        return F.linear(torch.relu(F.linear(x, self.scaled * 2)), self.last.t())


def test_products_and_what_is_refused():
    module = randomise(Products()).double()
    x = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    program = gp.trace(module, (x,), None, {"x": None})
    sites = find_sites(program)
    assert sites.parameters == ("right", "flipped", "left", "bank")
    found = layouts(sites)
    assert found["right"] == found["flipped"] == Matrix(transposed=True)
    assert found["left"] == Matrix(transposed=False, features=-2)
    assert found["bank"] == Bank(2, True, -1)
    assert "select reads it too" in sites.skipped["stacked"]
    assert "einsum reads it too" in sites.skipped["summed"]
    assert "mul reads it too" in sites.skipped["scaled"]
    treatment = Halving()
    new = stream(program, sites, batches(program, [x]), treatment, dtype=torch.float64)
    with torch.no_grad():
        a = torch.relu(x @ new["right"])
        b = torch.relu(a @ new["flipped"])
        c = torch.relu(new["left"] @ b)
    for name, rows in (("flipped", [a]), ("left", [b.transpose(1, 2)]), ("bank", c)):
        moments = treatment.moments[name]
        for own, part in zip(moments, rows, strict=True):
            flat = part.reshape(-1, part.shape[-1])
            torch.testing.assert_close(own.total, flat.T @ flat, rtol=1e-12, atol=1e-12)
    for name in sites.parameters:
        weight = dict(module.named_parameters())[name]
        layout = found[name]
        assert torch.equal(layout.restored(layout.matrices(weight), weight.shape), weight)
    # Halved along the inputs: dimension 0 of [in, out], the last one of [out, in].
    assert ((new["right"] == 0).sum(0) == 4).all()
    assert ((new["left"] == 0).sum(1) == 2).all()
    assert ((new["bank"] == 0).sum(1) == 2).all()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_chosen_matrices_are_multiplied_as_the_graph_does(left, transposed):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    chosen = torch.tensor([2, 0, 2, 3, 0, 0, 2])  # nobody chooses 1
    matrices = weight.transpose(1, 2) if transposed else weight
    rows = torch.randn(7, matrices.shape[2], generator=generator, dtype=torch.float64)
    own = matrices[chosen]
    expected = own @ rows[:, :, None] if left else rows[:, None] @ own.transpose(1, 2)
    layout = Experts(4, transposed, left)
    found = layout.product(weight, chosen, rows[:, :, None] if left else rows[:, None])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(layout.restored(layout.matrices(weight), weight.shape), weight)
    parts = dict(layout.rows(rows, chosen, None))
    assert torch.equal(parts[2], rows[[0, 2, 6]])
    assert len(parts[1]) == 0
    valid = torch.tensor([False, True, True, True, True, False, True])
    assert torch.equal(dict(layout.rows(rows, chosen, valid))[2], rows[[2, 6]])


@pytest.mark.parametrize(
    ("build", "ends"),
    [
        (decoders.llama_gqa_4, ("self_attn.o_proj.weight", "mlp.down_proj.weight")),
        (decoders.gpt2, ("attn.c_proj.weight", "mlp.c_proj.weight")),
        (encoders.bert, ("attention.output.dense.weight", "output.dense.weight")),
    ],
    ids=["llama", "gpt2", "bert"],
)
def test_what_writes_into_the_residual_stream(build, ends):
    program, _ = traced(build)
    sites = find_sites(program)
    expected = {n for n in sites.parameters if n.endswith(ends)}
    assert expected
    assert in_streams(program, sites) == expected
