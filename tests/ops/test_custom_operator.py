"""An operator of one's own: frozen and named without a rule, prunable and verified with one."""

import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.errors import GraphPruneError
from graphprune.ops import registry
from graphprune.ops.torch import ATEN
from zoo.case import check, prunable_sizes, randomise


@torch.library.custom_op("zoo::scaled_add", mutates_args=())
def scaled_add(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    return x + scale * y


@scaled_add.register_fake
def _(x, y, scale):
    return torch.empty_like(x)


@torch.library.custom_op("zoo::row_norms", mutates_args=())
def row_norms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norms = x.square().sum(-1, keepdim=True).sqrt()
    return x / norms, norms


@row_norms.register_fake
def _(x):
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))


class Net(nn.Module):
    """Two linear layers joined by one operator, normalised by another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        h = torch.ops.zoo.scaled_add(F.relu(self.a(x)), self.b(x), 0.5)
        return self.out(torch.ops.zoo.row_norms(h)[0])


# The two rules that docs/adding-an-operator.md asks its reader to write.


def scaled_add_rule(ctx, op):
    x, y = op.operands
    assert op["scale"] == 0.5
    for a, b in zip(x.dims, y.dims, strict=True):
        ctx.unify(a, b)
    return x.dims


def row_norms_rule(ctx, op):
    x = op.operands[0].dims
    return [x, (*x[:-1], ctx.fresh(1))]


def wrong_rule(ctx, op):
    return op.operands[0].dims[::-1]


def traced():
    return gp.trace(randomise(Net()), (torch.randn(4, 6),))


class EntryPoint:
    def __init__(self, name, function):
        self.name, self.value, self.function = name, f"mylib:{name}", function

    def load(self):
        return self.function


@pytest.fixture
def install(monkeypatch):
    """Pretends that a package with these entry points is installed."""

    def with_points(**rules):
        points = [EntryPoint(f"zoo.{name}", rule) for name, rule in rules.items()]
        # The table loads plug-ins once; here it has to do so again, and to forget them later.
        monkeypatch.setattr(ATEN, "_rules", dict(ATEN._rules))
        monkeypatch.setattr(ATEN, "_plugins_loaded", False)
        for module in (importlib.metadata, registry):
            monkeypatch.setattr(
                module, "entry_points", lambda group: points if group == "graphprune.ops" else []
            )

    return with_points


def test_without_a_rule_it_is_frozen_and_named():
    program = traced()
    assert prunable_sizes(program) == {}
    reason = program.frozen()["a.weight", 0]
    assert "no rule for operator zoo.scaled_add" in reason
    assert "test_custom_operator.py:" in reason
    assert set(program.typing.opaque) == {"scaled_add", "row_norms"}


def test_a_rule_makes_its_axes_prunable_and_the_oracle_agrees(install):
    install(scaled_add=scaled_add_rule, row_norms=row_norms_rule)
    program = traced()
    assert not program.typing.opaque
    assert prunable_sizes(program) == {"ffn": (10,)}
    (structure,) = [s for s in program.structures if s.prunable]
    assert {m for m in structure.members if m[0].endswith("weight")} == {
        ("a.weight", 0),
        ("b.weight", 0),
        ("out.weight", 1),
    }
    slim = check(program, {"ffn": 0.5})
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(slim.module(x), slim.exported.module()(x))


def test_with_one_rule_only_the_other_operator_is_the_reason(install):
    install(scaled_add=scaled_add_rule)
    reasons = traced().frozen()
    assert "zoo.row_norms" in reasons["a.weight", 0]
    assert "zoo.row_norms" in reasons["b.weight", 0]


def test_a_rule_that_is_wrong_about_sizes_counts_as_none(install):
    install(scaled_add=wrong_rule, row_norms=row_norms_rule)
    reason = traced().frozen()["a.weight", 0]
    assert "zoo.scaled_add: the rule gives sizes [10, 4], the graph [4, 10]" in reason


def test_a_rule_that_fails_counts_as_none(install):
    install(scaled_add=lambda ctx, op: op["nothing"], row_norms=row_norms_rule)
    assert "the rule for zoo.scaled_add failed" in traced().frozen()["a.weight", 0]


def test_two_rules_for_one_operator_are_an_error(install, monkeypatch):
    install(scaled_add=scaled_add_rule)
    twice = [EntryPoint("zoo.scaled_add", scaled_add_rule)] * 2
    monkeypatch.setattr(registry, "entry_points", lambda group: twice)
    with pytest.raises(GraphPruneError, match=r"zoo\.scaled_add has two rules"):
        traced()


def test_a_plug_in_that_can_not_be_loaded_is_named(install, monkeypatch):
    class Broken(EntryPoint):
        def load(self):
            raise ImportError("no module named mylib")

    install()
    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken("zoo.scaled_add", None)])
    with pytest.raises(GraphPruneError, match=r"zoo\.scaled_add") as caught:
        traced()
    assert "no module named mylib" in str(caught.value)
