"""Operator rules, each in the smallest module around it, with index sets by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.axes import indices
from zoo.case import check, prunable_sizes, randomise


class Around(nn.Module):
    """Two linear layers and a function between them; more parameters where asked for."""

    def __init__(self, function, inner=8, outer=8, **shapes):
        super().__init__()
        self.one, self.two = nn.Linear(5, inner), nn.Linear(outer, 3)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.function = function

    def forward(self, x):
        return self.two(self.function(self, F.relu(self.one(x))))


def traced(module, *shape):
    return gp.trace(randomise(module), (torch.randn(shape or (4, 5)),))


def columns(program, *units):
    """What of the second layer's columns stays when these units of the first one's rows leave."""
    (structure,) = (s for s in program.structures if ("one.weight", 0) in s.members)
    kept = tuple(i for i in range(structure.size) if i not in units)
    plan = gp.Plan(program.fingerprint, {structure.name: kept}, {structure.name: structure.size})
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim, dtype=torch.float64).raise_if_failed()
    return plan.kept(program)["two.weight"][1].tolist()


def test_flip():
    program = traced(Around(lambda m, h: h.flip(-1)))
    assert columns(program, 0, 2) == [0, 1, 2, 3, 4, 6]


def test_roll():
    program = traced(Around(lambda m, h: torch.roll(h, 3, -1)))
    assert prunable_sizes(program) == {"ffn": (5, 3)}
    slim = check(program, {"ffn": 0.5})
    (shift,) = (n.args[1] for n in slim.graph_module.graph.nodes if "roll" in str(n.target))
    kept = slim.plan.kept(program)
    rows = kept["one.weight"][0]
    assert shift == [int((rows >= 5).sum())]
    assert sorted((rows + 3) % 8) == kept["two.weight"][1].tolist()


def test_a_roll_of_everything_is_frozen():
    program = traced(Around(lambda m, h: torch.roll(h, 3)))
    assert "rolled as one" in program.frozen()["one.weight", 0]


def test_a_gather_by_a_buffer_renumbers_the_buffer():
    class Gather(Around):
        def __init__(self):
            super().__init__(lambda m, h: h[:, m.order])
            self.register_buffer("order", torch.tensor([3, 1, 7, 0, 2, 6, 5, 4]))

    program = traced(Gather())
    assert columns(program, 1, 6) == [0, 2, 3, 4, 6, 7]
    (structure,) = (s for s in program.structures if s.prunable)
    kept = (0, 2, 3, 4, 5, 7)
    slim = gp.apply(program, gp.Plan(program.fingerprint, {structure.name: kept}, {}))
    assert slim.weights["order"].tolist() == [2, 5, 0, 1, 4, 3]
    assert slim.module.state_dict()["order"].tolist() == [2, 5, 0, 1, 4, 3]


def test_a_shuffle_by_a_computed_permutation():
    def shuffle(m, h):
        order = torch.arange(8).view(2, 4).t().reshape(-1)
        return h[:, order]

    program = traced(Around(shuffle))
    assert prunable_sizes(program) == {"ffn": (2, 4)}
    check(program, {"ffn": 0.5})


def test_a_buffer_of_numbers_is_no_index():
    class Ramp(Around):
        def __init__(self):
            super().__init__(lambda m, h: h * m.ramp)
            self.register_buffer("ramp", torch.tensor([1, 0, 3, 2, 4, 6, 5, 7]))

    program = traced(Ramp())
    slim_or_reason = program.frozen().get(("one.weight", 0))
    if slim_or_reason is None:  # values that leave with their places are right as well
        check(program, {"ffn": 0.5})


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm(dim):
    def normed(m, h):
        return F.linear(h, torch._weight_norm(m.v, m.g, dim))

    g = {0: (8, 1), 1: (1, 8), -1: ()}[dim]
    program = traced(Around(normed, v=(8, 8), g=g))
    first = next(s for s in program.structures if ("one.weight", 0) in s.members)
    second = next(s for s in program.structures if ("two.weight", 1) in s.members)
    assert (("g", 1) in first.members) == (dim == 1)
    assert (("g", 0) in second.members) == (dim == 0)
    check(program, {first.role: 0.5})
    check(program, {"*": 0.5})


def test_bilinear():
    program = traced(Around(lambda m, h: F.bilinear(h, h, m.w, m.b), w=(8, 8, 8), b=(8,)))
    inside = next(s for s in program.structures if ("one.weight", 0) in s.members)
    outside = next(s for s in program.structures if ("two.weight", 1) in s.members)
    assert {("w", 1), ("w", 2)} <= set(inside.members)
    assert {("w", 0), ("b", 0)} <= set(outside.members)
    assert inside is not outside
    check(program, {"*": 0.5})


@pytest.mark.parametrize("where", ["leading", "none"])
def test_trilinear(where):
    """What bilinear becomes without its bias; dimensions are put in, or broadcast."""

    def form(m, h):
        if where == "none":
            return torch._trilinear(h, h, m.w, [], [], [], [0]).expand(5, 8)
        return torch._trilinear(h, m.w, h, [1, 3], [0], [1, 2], [2, 3])

    h, w = torch.randn(5, 8), torch.randn(8, 8, 8)
    bilinear = torch._trilinear(h, w, h, [1, 3], [0], [1, 2], [2, 3])
    assert torch.allclose(bilinear, F.bilinear(h, h, w), atol=1e-5)

    program = traced(Around(form, w=(8, 8, 8) if where == "leading" else (1, 8)))
    inside = next(s for s in program.structures if ("one.weight", 0) in s.members)
    members = {("w", 1), ("w", 2)} if where == "leading" else {("w", 1)}
    assert members <= set(inside.members)
    assert any(("two.weight", 1) in s.members for s in program.structures)
    check(program, {"*": 0.5})


@pytest.mark.parametrize(("bounds", "prunable"), [((0, 7), True), ((1, 7), False), ((0, 6), False)])
def test_clamped_places(bounds, prunable):
    """Chosen experts, kept within those that there are, as some versions of transformers do."""

    def chosen(m, h):
        ids = (h @ m.router).topk(2, -1).indices.clamp(*bounds)
        return m.bank[ids].sum(1)

    program = traced(Around(chosen, router=(8, 8), bank=(8, 8)))
    (experts,) = (s for s in program.structures if ("bank", 0) in s.members)
    assert experts.prunable == prunable
    assert (("router", 1) in experts.members) == prunable
    check(program, {"*": 0.5})


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.EmbeddingBag(9, 8, mode=mode), nn.Linear(8, 3)

        def forward(self, ids):
            return self.out(self.table(ids))

    ids = torch.randint(0, 9, (4, 5))
    program = gp.trace(randomise(Bag()), (ids,))
    assert prunable_sizes(program) == {"hidden": (8,)}
    check(program, {"hidden": 0.5})


def test_random_numbers_in_evaluation_mode_freeze():
    for function in (
        lambda m, h: F.dropout(h, 0.5, training=True),
        lambda m, h: h + torch.randn_like(h),
        lambda m, h: h + torch.rand(8),
    ):
        program = traced(Around(function))
        reason = program.frozen()["one.weight", 0]
        assert "random numbers" in reason or "rand" in reason
        assert "test_rules.py:" in reason


def test_dropout_is_neutral_in_evaluation_mode():
    program = traced(Around(lambda m, h: F.dropout(h, 0.5, training=False)))
    assert columns(program, 3) == [0, 1, 2, 4, 5, 6, 7]


def test_parameters_that_nothing_reads_are_frozen():
    program = traced(Around(lambda m, h: h, unused=(8, 3)))
    assert program.frozen()["unused", 0] == "no operator reads it (unused)"
    assert prunable_sizes(program) == {"ffn": (8,)}


def test_the_reason_of_a_piece_is_the_reason_of_the_whole():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Parameter(torch.zeros(1, 9, 6)), nn.Linear(6, 2)

        def forward(self, x):
            x = F.pad(x, (0, 0, 1, 1))[:, :9]
            return self.out(x + self.table)

    program = gp.trace(randomise(Places()), (torch.randn(2, 8, 6),))
    assert "a dimension of a model input" in program.frozen()["table", 1]


@pytest.mark.parametrize(
    ("kind", "gates"), [("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)]
)
def test_gates_are_outside_of_hidden_units(kind, gates):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
            cls = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}.get(kind, nn.RNNCell)
            self.cell, self.out = cls(5, 6, **options), nn.Linear(6, 2)

        def forward(self, x, h, c):
            state = self.cell(x, (h, c)) if kind == "lstm" else self.cell(x, h)
            return self.out(state[0] if kind == "lstm" else state)

    class Free(nn.Module):
        """The state comes from parameters, so that it isn't an input."""

        def __init__(self):
            super().__init__()
            self.body = Cell()
            self.h, self.c = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return self.body(x, *(t.expand(x.shape[0], -1) for t in (self.h, self.c)))

    program = traced(Free())
    e = program.axis("body.cell.weight_ih", 0)
    (structure,) = (s for s in program.structures if s.prunable and ("h", 0) in s.members)
    kept = torch.tensor([True, False, True, True, False, True]).numpy()
    rows = [g * 6 + u for g in range(gates) for u in (0, 2, 3, 5)]
    assert indices(e, {structure.atom: kept}).tolist() == rows
    check(program, {structure.role: 0.5})


def test_layers_that_share_a_parameter_stay():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return x + F.relu(self.linear(x))

    blocks = nn.Sequential(*(Block() for _ in range(3)))
    blocks[2].linear.weight = blocks[0].linear.weight
    program = traced(nn.Sequential(nn.Linear(5, 6), blocks, nn.Linear(6, 2)))
    (stack,) = (s for s in program.structures if s.blocks)
    assert [b.index for b in stack.blocks] == [1]


def test_a_norm_by_itself_is_no_layer():
    norms = nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6))
    module = nn.Sequential(nn.Linear(5, 6), norms, nn.Linear(6, 2))
    assert "layers" not in prunable_sizes(traced(module))
