"""Models that draw random numbers: with one seed, slim and masked are the same."""

from __future__ import annotations

import warnings

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphprune as gp
from emit.attention_nets import Attention, masked
from graphprune.errors import EmitError
from graphprune.ir.torch.randomness import noise_sources, seeded


class Noisy(nn.Module):
    """Two pairs of linear layers with noise between them."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x):
        return self.decoder(self.noise(self.encoder(x)))


def rsample(m):
    mean, spread = m.chunk(2, -1)
    return torch.cat([mean + torch.randn_like(mean) * (0.5 * spread).exp(), spread], -1)


def unread(m):
    torch.rand(3)
    return m + torch.randn_like(m)


NOISES = {
    "randn_like": lambda m: m + torch.randn_like(m),
    "reparameterised": rsample,
    "unread": unread,
    "rand": lambda m: m + torch.rand(m.shape[-1]),
    "normal": lambda m: torch.normal(m, m.abs()),
    "normal_of_a_size": lambda m: m + torch.normal(0.0, 1.0, (6,)),
    "dropout": lambda m: F.dropout(m, 0.5, training=True),
    "gumbel": F.gumbel_softmax,
    "bernoulli": lambda m: m * torch.bernoulli(m.sigmoid()),
    "multinomial": lambda m: m + torch.multinomial(m.softmax(-1), 6),
    "randperm": lambda m: m[:, torch.randperm(6)],
    "uniform_": lambda m: m + m.clone().uniform_(),
    "rrelu": lambda m: F.rrelu(m, training=True),
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_one_seed_gives_one_result(noise):
    """The judge is the dense module with zeros where the plan cuts."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    program = gp.trace(Noisy(noise).eval(), (x,))
    plan = gp.select(program, remove={"*": 0.5}, score="random", seed=3)
    slim = gp.apply(program, plan)
    state = torch.get_rng_state()
    gp.verify(program, plan, slim).raise_if_failed()
    assert slim.form == "class"
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own numbers go on as before
    judge = masked(slim).float()
    with torch.no_grad():
        torch.manual_seed(7)
        wanted = judge(x)
        torch.manual_seed(7)
        found = slim.module(x)
    torch.testing.assert_close(found, wanted)


class Block(nn.Module):
    """A residual block that looks at a noisy copy of its input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(self.up(x + torch.randn_like(x)).relu())


def test_removed_layers_draw_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(Block() for _ in range(4)))).eval()
    x = torch.randn(3, 8)
    program = gp.trace(model, (x,))
    plan = gp.select(program, remove={"layers": 0.5}, score="random", seed=1)
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim).raise_if_failed()
    (gone,) = slim.dropped_layers().values()
    assert len(gone) == 2
    left = nn.Sequential(model[0], *(b for i, b in enumerate(model[1]) if i not in gone))
    with torch.no_grad():
        torch.manual_seed(7)
        wanted = left(x)
        torch.manual_seed(7)
        found = slim.module(x)
    torch.testing.assert_close(found, wanted)


def test_heads_stay_where_dropout_draws_a_number_for_each():
    class Dropping(Attention):
        def forward(self, x):
            h = self.begin(x)
            q, k, v = (
                m(h).view(*h.shape[:2], self.heads, -1).transpose(1, 2)
                for m in (self.q, self.k, self.v)
            )
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
            return self.end(self.o(y.transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    program = gp.trace(Dropping("fused").eval(), (torch.randn(2, 5, 8),))
    found = {s.role for s in program.structures if s.prunable}
    assert {"qk_dim", "v_dim"} <= found
    assert "kv_heads" not in found
    plan = gp.select(program, remove={"*": 0.25}, score="random", seed=1)
    gp.verify(program, plan, gp.apply(program, plan)).raise_if_failed()


def test_what_cannot_draw_the_same_is_named(tmp_path):
    torch.manual_seed(0)
    program = gp.trace(Noisy(NOISES["randn_like"]).eval(), (torch.randn(4, 8),))
    slim = gp.apply(program, gp.select(program, remove={"*": 0.5}))
    assert noise_sources(slim.exported.graph) == [program.frozen()["encoder.2.weight", 0][16:-1]]
    with pytest.raises(EmitError, match="draws random numbers") as caught:
        slim.save(tmp_path / "slim.onnx", "onnx")
    assert "randn_like at test_random_numbers.py:" in str(caught.value.where)
    assert not list(tmp_path.iterdir())
    slim.save(tmp_path / "slim.pt2", "pt2")
    again = gp.load(tmp_path / "slim.pt2")
    x = torch.randn(4, 8)
    with torch.no_grad(), seeded(3):
        wanted = slim.module(x)
    with torch.no_grad(), seeded(3):
        torch.testing.assert_close(again.exported.module()(x), wanted)


def test_seeding_leaves_nothing_behind():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with seeded(1):
        first = torch.rand(3)
    with seeded(1), warnings.catch_warnings():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("operator", ["RandomNormalLike", "RandomUniformLike", "Bernoulli"])
def test_onnx_operators_without_a_seed(operator, tmp_path):
    """ONNX Runtime seeds them by their place in the model, which a removed layer changes."""
    generator = torch.Generator().manual_seed(0)

    def weight(name, *shape):
        return numpy_helper.from_array(torch.randn(shape, generator=generator).numpy(), name)

    weights = [weight("in", 8, 6), weight("out", 6, 4)]
    nodes = [helper.make_node("MatMul", ["x", "in"], ["h0"])]
    for i in range(3):
        up, down = f"layers.{i}.up", f"layers.{i}.down"
        weights += [weight(up, 6, 10), weight(down, 10, 6)]
        h, n = f"h{i}", f"/layers.{i}/"
        nodes += [
            helper.make_node("MatMul", [h, up], [n + "a"], name=n + "up"),
            helper.make_node("Relu", [n + "a"], [n + "b"], name=n + "relu"),
            helper.make_node("MatMul", [n + "b", down], [n + "c"], name=n + "down"),
            helper.make_node("Add", [h, n + "c"], [f"h{i + 1}"], name=n + "add"),
        ]
    nodes += [
        helper.make_node("Sigmoid", ["h3"], ["s"]),
        helper.make_node(operator, ["s"], ["r"]),
        helper.make_node("Add", ["h3", "r"], ["m"]),
        helper.make_node("MatMul", ["m", "out"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "noisy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "noisy.onnx")
    program = gp.load(tmp_path / "noisy.onnx")
    assert "random numbers" in program.frozen()["out", 0]
    plan = gp.select(program, remove={"layers": 1 / 3}, score="random")
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim).raise_if_failed()
    slim.save(tmp_path / "slim.onnx", "onnx")
    gp.verify(program, plan, tmp_path / "slim.onnx").raise_if_failed()
    written = onnx.load(tmp_path / "slim.onnx")
    assert not any(a.name == "seed" for node in written.graph.node for a in node.attribute)
