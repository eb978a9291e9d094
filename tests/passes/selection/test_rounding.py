"""Budgets that no size meets: the nearest below, against every size that there is."""

from __future__ import annotations

import itertools
import math

import pytest

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.passes.selection.select import select

BOTH = ("ffn", "heads")  # of two heads one is a half, which a budget leaves whole where it can


def parameters(ffn: int, kv: int, hidden: int = 48, vocabulary: int = 96, layers: int = 3) -> int:
    """Of the model of these tests: heads of 8 with three queries to each key-value head, tied."""
    attention = 2 * 3 * 8 * kv * hidden + 2 * 8 * kv * hidden
    return vocabulary * hidden + layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden


def test_the_count_of_these_tests(gqa: Program) -> None:
    assert gqa.module is not None
    assert sum(p.numel() for p in gqa.module.parameters()) == parameters(80, 2)


@pytest.mark.parametrize("budget", [0.95, 0.9, 0.8, 0.62, 0.55, 0.4, 0.36])
@pytest.mark.parametrize("align", [16, 32, "gpu"])
def test_the_nearest_below(gqa: Program, budget: float, align: int | str) -> None:
    step = 64 if align == "gpu" else int(align)
    sizes = [80, *range(80 // step * step, 0, -step)]
    reachable = [parameters(ffn, kv) for ffn, kv in itertools.product(sizes, (2, 1))]
    wanted = int(budget * parameters(80, 2))
    notes: list[str] = []
    if min(reachable) > wanted:
        with pytest.raises(PlanError, match="not reachable") as caught:
            select(gqa, target={"params": budget}, align=align, score="random", roles=BOTH)
        assert f"ask for {min(reachable):,} or more" in str(caught.value)
        return
    nearest = max(n for n in reachable if n <= wanted)
    plan = select(
        gqa, target={"params": budget}, align=align, score="random", roles=BOTH, notes=notes
    )
    kept = plan.kept(gqa)
    reached = sum(math.prod(map(len, kept[n])) for n in kept if n in gqa.trainable)
    assert 0.995 * nearest <= reached <= wanted
    assert any(f"rounded down to {reached:,}" in n for n in notes) == (reached < 0.995 * wanted)


def test_of_equally_near_sizes_the_most_even_is_taken(make_llama) -> None:
    """Without alignment many pairs of sizes come within half a percent."""
    program = make_llama(hidden=64, ffn=1024, heads=8, kv=4, layers=1)
    plan = select(program, target={"params": 0.6}, score="random")
    counts = {program.by_name[n].role: len(u) for n, u in plan.kept_units.items()}
    assert counts["kv_heads"] == 2
    assert 0.45 < counts["ffn"] / 1024 < 0.7


def test_a_budget_that_is_met_needs_no_note(gqa: Program) -> None:
    notes: list[str] = []
    select(gqa, target={"params": 0.7}, score="random", roles=BOTH, notes=notes)
    assert notes == []


def test_a_budget_of_more_than_the_model_has(gqa: Program) -> None:
    notes: list[str] = []
    assert select(gqa, target={"bytes": 10**9}, notes=notes).kept_units == {}
    assert "more than the 231,744 of the dense model" in notes[0]


def test_python_is_warned(gqa: Program) -> None:
    with pytest.warns(UserWarning, match="rounded down to"):
        select(gqa, target={"params": 0.9}, align=64, score="random")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"align": 32}, "ffn: 64 of 80 stay instead of 56"),
        ({"align": 8}, None),
        ({"minimum": 60}, "ffn: 60 of 80 stay instead of 56"),
        ({"align": 32, "uniform": False}, "of 240 stay instead of 168"),
    ],
)
def test_fractions_that_are_rounded(gqa: Program, options: dict, note: str | None) -> None:
    notes: list[str] = []
    plan = select(gqa, remove={"ffn": 0.3}, score="random", notes=notes, **options)
    if note is None:
        assert notes == []
        return
    assert note in notes[0]
    kept = [
        len(plan.kept_units.get(s.name, range(s.size))) for s in gqa.structures if s.role == "ffn"
    ]
    assert str(kept[0] if options.get("uniform", True) else sum(kept)) in notes[0]


def test_the_report_says_so(gqa: Program) -> None:
    report = gp.compile(
        gqa, {"target": {"params": 0.9}, "align": "gpu", "score": "random"}, dry_run=True
    )
    (note,) = (n for n in report.notes if "rounded down" in n)
    assert f"{report.after.parameters:,}" in note
    assert report.after.parameters == parameters(64, 2)
