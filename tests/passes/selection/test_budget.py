"""Budgets: reached within half a percent where sizes allow it, and never exceeded."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.analysis.cost import Cost
from graphprune.axes import Ragged
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.passes.selection.budget import RESOURCES, fit
from graphprune.passes.selection.select import select
from graphprune.plan.plan import Plan

DENSE = 1_000_000


@pytest.fixture(scope="module")
def wide(make_llama) -> Program:
    """Wide enough that one unit of every layer is less than half a percent."""
    return make_llama(hidden=64, ffn=1024, heads=8, kv=4, layers=3)


def cost_of(program: Program, plan: Plan) -> Cost:
    selection = plan.bind(program)
    counts = {
        atom: kept.count if isinstance(kept, Ragged) else int(kept.sum())
        for atom, kept in selection.keep.items()
    }
    return program.costs.total(counts, [b for cut in selection.cuts.values() for b in cut])


@pytest.mark.parametrize("resource", sorted(RESOURCES))
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("uniform", [True, False])
def test_budgets(wide: Program, resource: str, fraction: float, uniform: bool) -> None:
    plan = select(wide, target={resource: fraction}, uniform=uniform)
    dense = RESOURCES[resource](wide.costs.total())
    reached = RESOURCES[resource](cost_of(wide, plan))
    assert 0.995 * fraction * dense <= reached <= fraction * dense
    kept = {
        role: {len(plan.kept_units[s.name]) for s in wide.structures
               if s.role == role and s.name in plan.kept_units}
        for role in ("ffn", "kv_heads")
    }  # fmt: skip
    if uniform:
        assert len(kept["ffn"]) == 1
    assert {s.role for s in wide.structures if s.name in plan.kept_units} <= {"ffn", "kv_heads"}


def test_the_cost_is_what_the_kept_indices_add_up_to(wide: Program) -> None:
    plan = select(wide, target={"params": 0.6}, roles=["ffn", "heads", "hidden", "layers"])
    kept = plan.kept(wide)
    names = [n for n in kept if n in wide.trainable]
    params = sum(math.prod(len(dim) for dim in kept[n]) for n in names)
    assert params == cost_of(wide, plan).params <= 0.6 * wide.costs.total().params


def test_an_absolute_budget(wide: Program) -> None:
    budget = int(0.6 * wide.costs.total().params)
    plan = select(wide, target={"params": budget})
    assert 0.995 * budget <= cost_of(wide, plan).params <= budget


def test_the_whole_is_reached_by_removing_nothing(wide: Program) -> None:
    assert select(wide, target={"params": 1.0}).kept_units == {}


def test_budget_with_alignment(wide: Program) -> None:
    plan = select(wide, target={"params": 0.6}, align={"ffn": 8}, uniform=False)
    assert 0.995 * 0.6 <= cost_of(wide, plan).params / wide.costs.total().params <= 0.6
    for s in wide.structures:
        if s.role == "ffn":
            assert len(plan.kept_units[s.name]) % 8 == 0


def test_named_roles_take_part(wide: Program) -> None:
    plan = select(wide, target={"params": 0.6}, roles=["layers", "ffn"], score="random")
    roles = {s.role for s in wide.structures if s.name in plan.kept_units}
    assert roles == {"layers", "ffn"}
    assert 0.995 * 0.6 <= cost_of(wide, plan).params / wide.costs.total().params <= 0.6
    plan = select(wide, target={"macs": 0.9}, roles=["heads", "ffn", "hidden"])
    assert {s.role for s in wide.structures if s.name in plan.kept_units} <= {
        "kv_heads", "ffn", "hidden",
    }  # fmt: skip


def test_excluded_structures_take_no_part(wide: Program) -> None:
    plan = select(wide, target={"params": 0.8}, exclude=["model.layers.1.*"])
    assert not any(".layers.1." in name for name in plan.kept_units)
    assert 0.995 * 0.8 <= cost_of(wide, plan).params / wide.costs.total().params <= 0.8


def test_convolutions(convs: Program) -> None:
    plan = select(convs, target={"macs": 0.5})
    assert 0.99 * 0.5 <= cost_of(convs, plan).macs / convs.costs.total().macs <= 0.5


def test_an_impossible_budget_states_the_smallest(wide: Program) -> None:
    least = cost_of(wide, select(wide, remove={"ffn": 0.9999, "heads": 0.9999})).params
    with pytest.raises(PlanError, match="not reachable") as caught:
        select(wide, target={"params": 0.02})
    assert f"ask for {least:,} or more" in str(caught.value)
    assert select(wide, target={"params": least}, score="random").kept_units
    with pytest.raises(PlanError, match="not reachable"):
        select(wide, target={"params": least - 1})


def test_a_budget_between_two_steps_is_rounded_down(gqa: Program) -> None:
    with pytest.warns(UserWarning, match="rounded down"):
        plan = select(gqa, target={"params": 0.9}, roles=["heads"])
    assert plan == select(gqa, remove={"heads": 0.5})


@pytest.mark.parametrize(
    "target", [{}, {"params": 0.5, "macs": 0.5}, {"flops": 0.5}, {"params": 0}, {"params": -1},
               {"params": 1.5}, {"params": float("nan")}]
)  # fmt: skip
def test_what_is_no_target(gqa: Program, target: dict) -> None:
    with pytest.raises(PlanError):
        select(gqa, target=target)


class Fake:
    """A lever of one structure: `steps` units, each of the given cost."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.removable = name, steps, steps

    def at(self, k: int) -> dict[str, int]:
        return {self.name: self.steps - k}

    def wanted(self, fraction: float) -> int:
        return round(fraction * self.steps)

    def nearest(self, fraction: float) -> int:
        return self.wanted(fraction)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30_000)), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_the_fit_is_within_a_step_of_the_finest_lever(
    coarse: list[tuple[int, int]], where: float
) -> None:
    """One lever is fine enough for any budget that it can make up for; none is exceeded."""
    prices = {"fine": 50, **{f"c{i}": price for i, (_, price) in enumerate(coarse)}}
    levers: list[Any] = [
        Fake("fine", 20_000),
        *(Fake(f"c{i}", steps) for i, (steps, _) in enumerate(coarse)),
    ]
    full = {lever.name: lever.steps for lever in levers}

    def measure(counts: dict[str, int]) -> int:
        return DENSE + sum(prices[n] * k for n, k in {**full, **counts}.items())

    budget = DENSE + int(where * (measure({}) - DENSE))
    counts = fit(levers, measure, budget)
    assert 0.995 * budget <= measure(counts) <= budget
    assert all(0 <= k <= full[n] for n, k in counts.items())


@pytest.mark.parametrize(
    ("kv_heads", "budget", "taken"),
    [(3, 0.8, {"ffn"}), (3, 0.45, {"ffn", "kv_heads"}), (4, 0.8, {"ffn", "kv_heads"})],
)
def test_coarse_units_stay_where_finer_ones_can_pay(
    make_llama: Any, kv_heads: int, budget: float, taken: set[str]
) -> None:
    """One of three heads is a third of them, one of four a quarter; and the ffn has its limit."""
    program = make_llama(heads=12, kv=kv_heads, ffn=192)
    plan = select(program, target={"params": budget}, score="random")
    assert {program.by_name[name].role for name in plan.kept_units} == taken
    named = select(program, target={"params": 0.8}, roles=["ffn", "heads"], score="random")
    assert {program.by_name[name].role for name in named.kept_units} == {"ffn", "kv_heads"}


@pytest.mark.parametrize("align", [128, {"ffn": 128}, {"heads": 16}])
def test_alignment_may_leave_a_role_no_step(gqa: Program, align: Any) -> None:
    """Of the other role as much goes as the budget asks for; of none it can't be met."""
    taken = {"ffn"} if align == {"heads": 16} else {"kv_heads"}
    plan = select(gqa, target={"params": 0.9}, align=align, score="random", notes=[])
    assert {gqa.by_name[name].role for name in plan.kept_units} == taken
    assert gqa.module is not None
    whole: int = sum(p.numel() for p in gqa.module.parameters())
    kept = plan.kept(gqa)
    left = sum(math.prod(map(len, kept[name])) for name in kept if name in gqa.trainable)
    assert left <= 0.9 * whole
