"""An operator of one's own: frozen and named without a rule, prunable and verified with one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.errors import GraphPruneError
from graphprune.ops import OpDef, register_op, registry
from graphprune.report.operators import operators
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
    def __init__(self, name, registered, value=None):
        self.name, self.value, self.registered = name, value or f"mylib:{name}", registered

    def load(self):
        return self.registered


@pytest.fixture
def apart(monkeypatch):
    """A registry whose further operators are gone after the test."""
    monkeypatch.setattr(registry, "OPERATORS", registry.OPERATORS.copy())


@pytest.fixture
def install(apart, monkeypatch):
    """Pretends that a package with these entry points is installed."""

    def with_points(*points, **rules):
        found = [*points, *(EntryPoint(f"zoo.{n}", OpDef(rule)) for n, rule in rules.items())]
        monkeypatch.setattr(
            registry, "entry_points", lambda group: found if group == "graphprune.ops" else []
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


@pytest.mark.parametrize("name", ["zoo.scaled_add", "zoo::scaled_add"])
def test_two_packages_with_one_operator_are_an_error(install, name):
    first = EntryPoint("zoo.scaled_add", OpDef(scaled_add_rule), "mylib:ADD")
    install(first, EntryPoint(name, OpDef(scaled_add_rule), "other:ADD"))
    for _ in range(2):  # and stay one
        with pytest.raises(GraphPruneError, match=r"zoo\.scaled_add is registered twice") as caught:
            traced()
        assert "mylib:ADD" in caught.value.why
        assert "other:ADD" in caught.value.why


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("aten.permute", "graphprune.ops.torch.aten._permute"),
        ("onnx.Softmax", "graphprune.ops.families.pointwise.distribution"),
        ("com.microsoft.MoE", "graphprune.ops.onnx.contrib._experts"),
    ],
)
def test_our_operators_can_not_be_registered(install, name, own):
    with pytest.raises(GraphPruneError, match="is registered twice") as caught:
        register_op(name, OpDef(scaled_add_rule))
    assert f"{own} and {scaled_add_rule.__module__}.scaled_add_rule" in caught.value.why
    install(EntryPoint(name, OpDef(scaled_add_rule), "mylib:ADD"))
    with pytest.raises(GraphPruneError, match="is registered twice") as caught:
        traced()
    assert own in caught.value.why
    assert "mylib:ADD" in caught.value.why


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    "operator",
    [
        scaled_add,
        torch.ops.zoo.scaled_add,
        torch.ops.zoo.scaled_add.default,
        "zoo::scaled_add",
        "zoo.scaled_add",
    ],
)
def test_in_a_script(operator):
    register_op(operator, OpDef(scaled_add_rule))
    register_op("zoo::row_norms", OpDef(row_norms_rule))
    assert not traced().typing.opaque
    assert operators()["zoo.scaled_add"] == OpDef(scaled_add_rule)
    with pytest.raises(GraphPruneError, match=r"zoo\.scaled_add is registered twice"):
        register_op(torch.ops.zoo.scaled_add, OpDef(wrong_rule))


def test_a_script_can_not_register_what_a_package_has(install):
    install(scaled_add=scaled_add_rule, row_norms=row_norms_rule)
    traced()
    with pytest.raises(GraphPruneError, match=r"zoo\.scaled_add is registered twice"):
        register_op("zoo::scaled_add", OpDef(wrong_rule))


def test_a_package_can_not_register_what_a_script_has(install):
    install(scaled_add=scaled_add_rule)
    register_op("zoo::scaled_add", OpDef(wrong_rule))
    with pytest.raises(GraphPruneError, match=r"zoo\.scaled_add is registered twice"):
        traced()


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("operator", ["scaled_add", "zoo::", "::scaled_add", "zoo::a b", 3, print])
def test_names_without_a_namespace(operator):
    with pytest.raises(GraphPruneError, match="is no operator that can be registered"):
        register_op(operator, OpDef(scaled_add_rule))


def test_a_plug_in_that_can_not_be_loaded_is_named(install):
    class Broken(EntryPoint):
        def load(self):
            raise ImportError("no module named mylib")

    install(Broken("zoo.scaled_add", None))
    with pytest.raises(GraphPruneError, match=r"zoo\.scaled_add") as caught:
        traced()
    assert "no module named mylib" in str(caught.value)


def test_a_plug_in_without_a_definition_is_named(install):
    install(EntryPoint("zoo.scaled_add", scaled_add_rule, "mylib:rule"))
    with pytest.raises(GraphPruneError, match=r"zoo\.scaled_add is no definition") as caught:
        traced()
    assert "'mylib:rule'" in caught.value.where
    assert "OpDef" in caught.value.hint


def test_our_operators_have_every_rule_in_one_table():
    """Rules of sizes and formulas belong to operators whose axes are known, but for shapes."""
    found = operators()
    assert {name for name, known in found.items() if known.axes is None} == {
        "com.microsoft.BiasSoftmax",  # frozen, and what follows them is not
        "com.microsoft.Inverse",
    }
    for name in ("aten.layer_norm", "aten.group_norm", "onnx.GroupNormalization"):
        known = found[name]
        assert None not in (known.axes, known.sizes, known.masked), name
    assert found["com.microsoft.GroupNorm"].shapes is not None
