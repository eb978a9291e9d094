"""Selection: fractions, exact shapes, globs, alignment, floors, and what each mistake is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.frontends.tracing.trace import trace
from graphprune.ir.torch.program import Program
from graphprune.passes.selection.levers import GlobalLever, round_half_up
from graphprune.passes.selection.rank import rank
from graphprune.passes.selection.scope import Candidate, Scope
from graphprune.passes.selection.select import select
from graphprune.plan.plan import Plan


def sizes(program: Program, plan: Plan, role: str) -> list[int]:
    """Kept counts of the structures of a role, in the program's order."""
    result = []
    for structure in program.structures:
        if structure.role == role:
            kept = plan.kept_units.get(structure.name, range(structure.size))
            result.append(len(kept[0]) if isinstance(kept[0], tuple) else len(kept))
    return result


def fail(program: Program, **options) -> str:
    with pytest.raises(PlanError) as caught:
        select(program, **options)
    return str(caught.value)


@dataclass(frozen=True)
class Given:
    """Scores by structure name, or by role; ones for the rest."""

    scores: dict

    def score(self, program, structures, inputs):
        result = {}
        for s in structures:
            outer = (s.within.size,) if s.within else ()
            value = self.scores.get(s.name, self.scores.get(s.role, np.ones((*outer, s.size))))
            result[s.name] = np.asarray(value, dtype=float)[None]
        return result


def of_role(program: Program, role: str) -> list[Structure]:
    return [s for s in program.structures if s.role == role]


def test_the_smallest_channels_of_an_mlp_go(make_mlp) -> None:
    up = torch.ones(8, 5)
    up[2], up[6] = 0.1, 0.2
    program = make_mlp(up_weight=up)
    plan = select(program, remove={"ffn": 0.25})
    assert plan.kept_units == {"up.weight:0": (0, 1, 3, 4, 5, 7)}
    assert plan.sizes == {"up.weight:0": 8}
    bare = Plan(plan.fingerprint, plan.kept_units)
    assert Plan.from_json(bare.to_json()) == bare
    assert plan.fingerprint == program.fingerprint
    kept = plan.kept(program)
    assert kept["down.weight"][1].tolist() == [0, 1, 3, 4, 5, 7]
    assert kept["up.bias"][0].tolist() == [0, 1, 3, 4, 5, 7]


def test_what_goes_depends_on_the_other_members_too(make_mlp) -> None:
    up = torch.ones(8, 5)
    up[2] = 0.1
    down = torch.ones(3, 8)
    down[:, 2], down[:, 4] = 9, 0
    plan = select(
        make_mlp(up_weight=up, down_weight=down), remove={"ffn": 1 / 8}, score="magnitude"
    )
    assert 4 not in plan.kept_units["up.weight:0"]


def test_of_equal_units_the_first_stay(make_mlp) -> None:
    assert select(make_mlp(), remove={"ffn": 0.5}).kept_units == {"up.weight:0": (0, 1, 2, 3)}


@pytest.mark.parametrize(
    ("size", "fraction", "left"),
    [(8, 0.25, 6), (3, 1 / 3, 2), (3, 0.5, 1), (8, 0.05, 8), (8, 0.0625, 7), (8, 0.99, 1)],
)
def test_counts_round_to_nearest(size: int, fraction: float, left: int) -> None:
    program = trace(
        nn.Sequential(nn.Linear(2, size), nn.ReLU(), nn.Linear(size, 2)).eval(), (torch.ones(1, 2),)
    )
    assert sizes(program, select(program, remove={"ffn": fraction}), "ffn") == [left]


def test_half_rounds_up() -> None:
    assert [round_half_up(x) for x in (0.49, 0.5, 1.5, 2.5, 0.29 * 50)] == [0, 1, 2, 3, 15]


def test_heads_are_key_value_heads(gqa: Program, make_llama) -> None:
    plan = select(gqa, remove={"heads": 0.5, "ffn": 0.25})
    assert sizes(gqa, plan, "kv_heads") == [1, 1, 1]
    assert sizes(gqa, plan, "query_heads") == [3, 3, 3]
    assert sizes(gqa, plan, "ffn") == [60, 60, 60]
    assert plan == select(gqa, remove={"kv_heads": 0.5, "ffn": 0.25})
    only_queries = dataclasses.replace(
        gqa, structures=tuple(s for s in gqa.structures if s.role != "kv_heads")
    )
    plan = select(only_queries, remove={"heads": 1 / 3})
    assert sizes(only_queries, plan, "query_heads") == [2, 2, 2]
    multi_query = make_llama(heads=4, kv=1, hidden=32, layers=2)
    plan = select(multi_query, remove={"heads": 0.5})
    assert len(plan.kept(multi_query)["model.layers.1.self_attn.q_proj.weight"][0]) == 16


def test_star_is_every_prunable_role_and_a_named_one_wins(gqa: Program) -> None:
    plan = select(gqa, remove={"*": 0.5, "heads": 0, "layers": 0})
    assert sizes(gqa, plan, "kv_heads") == [2, 2, 2]
    assert sizes(gqa, plan, "layers") == [3]
    assert sizes(gqa, plan, "hidden") == [24]
    assert sizes(gqa, plan, "query_heads") == [1, 1, 1]
    assert sizes(gqa, plan, "qk_dim") == [2]
    assert sizes(gqa, plan, "v_dim") == [4, 4, 4]


def test_each_key_value_head_keeps_its_own_query_heads(gqa: Program) -> None:
    first, second = of_role(gqa, "query_heads")[:2]
    score = Given({first.name: [[3, 1, 2], [1, 3, 2]]})
    plan = select(gqa, remove={"query_heads": 1 / 3}, score=score)
    assert plan.kept_units[first.name] == ((0, 2), (1, 2))
    assert plan.kept_units[second.name] == ((0, 1), (0, 1))
    rows = plan.kept(gqa)["model.layers.0.self_attn.q_proj.weight"][0]
    assert sorted({int(r) // 8 for r in rows}) == [0, 2, 4, 5]
    even = select(gqa, remove={"query_heads": 1 / 3}, score=score, ragged=False)
    assert even.kept_units[first.name] == (0, 1)  # sums 4, 4, 4: of equals the first stay


def test_excluded_structures_stay_whole(gqa: Program) -> None:
    plan = select(gqa, remove={"ffn": 0.5}, exclude=["model.layers.1.*"])
    assert sizes(gqa, plan, "ffn") == [40, 80, 40]
    assert sizes(gqa, select(gqa, remove={"ffn": 0.5}, include=["*.0.mlp.*"]), "ffn") == [
        40,
        80,
        80,
    ]
    # The hidden axis touches layer 1, so nothing of it may go.
    told = fail(gqa, remove={"hidden": 0.5}, exclude=["model.layers.1.*"])
    assert "exclude and include leave no structure" in told
    # A tied name stands for the parameter that it shares.
    assert "leave no structure" in fail(gqa, remove={"hidden": 0.5}, exclude=["lm_head.*"])


def test_a_glob_that_matches_nothing_is_a_mistake(gqa: Program) -> None:
    assert "'model.layer.0.*'" in fail(gqa, remove={"ffn": 0.5}, exclude=["model.layer.0.*"])


def test_layers_with_the_lowest_scores_go(gqa: Program) -> None:
    score = Given({"layers": [1, 3, 2]})
    plan = select(gqa, remove={"layers": 1 / 3}, score=score)
    assert plan.kept_units == {"model.layers": (1, 2)}
    plan = select(gqa, shape={"layers": 1}, score=score, exclude=["model.layers.0.*"])
    assert plan.kept_units == {"model.layers": (0,)}
    plan = select(gqa, remove={"layers": 0.5}, score=score, exclude=["model.layers.0.*"])
    assert plan.kept_units == {"model.layers": (0,)}  # half of all three, rounded up
    told = fail(gqa, shape={"layers": 1}, exclude=["model.layers.[01].*"])
    assert "reachable values are 2 to 3" in told


def test_magnitude_of_layers(gqa: Program) -> None:
    norms = [
        sum(float(gqa.weights[p].detach().square().sum()) for p in b.parameters)
        for b in of_role(gqa, "layers")[0].blocks
    ]
    plan = select(gqa, remove={"layers": 1 / 3})
    assert set(range(3)) - set(plan.kept_units["model.layers"]) == {int(np.argmin(norms))}


@pytest.mark.parametrize(
    ("align", "fraction", "left"),
    [
        (8, 0.3, 56),  # 56 exactly
        (32, 0.3, 64),  # 56 lies between 32 and 64
        (48, 0.1, 80),  # 72 lies nearer to the whole than to 48
        (64, 0.9, 64),  # never 0
        ({"ffn": 16}, 0.25, 64),  # 60 is nearer to 64
        ({"*": 16, "ffn": 5}, 0.25, 60),
        ({"hidden": 16}, 0.25, 60),
        (40, 0.25, 40),  # 60 is as near to 40 as to 80
    ],
)
def test_alignment(gqa: Program, align, fraction: float, left: int) -> None:
    plan = select(gqa, remove={"ffn": fraction}, align=align)
    assert sizes(gqa, plan, "ffn") == [left] * 3


def test_alignment_counts_positions(gqa: Program) -> None:
    # A key-value head is 8 positions of k_proj, a rotary pair 2 of a head, a layer none.
    assert sizes(gqa, select(gqa, remove={"heads": 0.5}, align=8), "kv_heads") == [1] * 3
    assert sizes(gqa, select(gqa, remove={"qk_dim": 0.25}, align=4), "qk_dim") == [2]
    assert sizes(gqa, select(gqa, remove={"qk_dim": 0.25}, align=2), "qk_dim") == [3]
    assert sizes(gqa, select(gqa, remove={"layers": 0.3}, align=8), "layers") == [2]
    assert "no size below the whole" in fail(gqa, remove={"heads": 0.5}, align={"heads": 16})
    assert sizes(gqa, select(gqa, remove={"heads": 0.5}, align=16), "kv_heads") == [1] * 3


def test_minimum(gqa: Program) -> None:
    assert sizes(gqa, select(gqa, remove={"ffn": 0.9}, minimum=30), "ffn") == [30] * 3
    assert sizes(gqa, select(gqa, remove={"ffn": 0.9}, minimum=0.3), "ffn") == [24] * 3
    assert sizes(gqa, select(gqa, remove={"ffn": 0.9}, minimum=30, align=8), "ffn") == [32] * 3
    assert sizes(gqa, select(gqa, remove={"*": 0.9}, minimum=2), "kv_heads") == [2] * 3


def test_what_the_model_cannot_do_without_stays(gqa: Program) -> None:
    structures = tuple(
        dataclasses.replace(s, minimum=50) if s.role == "ffn" else s for s in gqa.structures
    )
    program = dataclasses.replace(gqa, structures=structures)
    assert sizes(program, select(program, remove={"ffn": 0.9}), "ffn") == [50] * 3
    assert "50 to 80" in fail(program, shape={"ffn": 40})


def test_global_ranking(gqa: Program) -> None:
    names = [s.name for s in of_role(gqa, "ffn")]
    # One structure is a thousandth of the others: normalisation makes them alike again.
    values = np.random.default_rng(0).permutation(240).reshape(3, 80) + 1.0
    scores = {n: v * f for n, v, f in zip(names, values, (1e-3, 1, 1), strict=True)}
    plan = select(gqa, remove={"ffn": 0.25}, score=Given(scores), uniform=False)
    normalised = values / values.mean(axis=1, keepdims=True)
    threshold = np.sort(normalised.ravel())[60]
    for name, row in zip(names, normalised, strict=True):
        assert plan.kept_units[name] == tuple(np.flatnonzero(row >= threshold).tolist())
    plan = select(gqa, remove={"ffn": 1 / 3}, score=Given(scores), uniform=False, normalize="none",
                  minimum=10)  # fmt: skip
    assert sizes(gqa, plan, "ffn")[0] == 10  # the small one is pruned to its floor ...
    assert sum(sizes(gqa, plan, "ffn")) == 160  # ... and the others give the rest


def test_global_ranking_with_alignment(gqa: Program) -> None:
    plan = select(gqa, remove={"ffn": 0.4}, uniform=False, align=16, score="random", seed=3)
    kept = sizes(gqa, plan, "ffn")
    assert all(n % 16 == 0 and n for n in kept)
    assert sum(kept) == 144


def test_global_ranking_of_ragged_structures(gqa: Program) -> None:
    plan = select(gqa, remove={"query_heads": 4 / 9}, uniform=False, score="random")
    assert sum(sizes(gqa, plan, "query_heads")) == 5
    plan.kept(gqa)  # counts are equal in every row


def test_a_global_step_costs_what_its_units_are_worth() -> None:
    structure = Structure("s", "ffn", 6, (), True, None, 0, 0)
    ranked = rank(structure, np.array([[6.0, 5, 4, 3, 2, 1]]), normalize="none")
    candidate = Candidate(structure, np.arange(6), np.array([6, 4, 2]))
    other = Candidate(
        Structure("t", "ffn", 2, (), True, None, 0, 0), np.arange(2), np.array([2, 1])
    )
    prices = {"s": ranked, "t": rank(other.structure, np.array([[2.0, 9.0]]), normalize="none")}
    lever = GlobalLever.of([candidate, other], prices)
    assert lever.sequence.tolist() == [0, 1, 0]  # 1.5 for a pair, then 2, then 3.5
    assert lever.removed.tolist() == [0, 2, 3, 5]
    assert lever.at(2) == {"s": 4, "t": 1}


def test_exact_shape(gqa: Program) -> None:
    plan = select(gqa, shape={"hidden": 32, "heads": 1, "layers": 2, "ffn": 41})
    assert sizes(gqa, plan, "hidden") == [32]
    assert sizes(gqa, plan, "kv_heads") == [1] * 3
    assert sizes(gqa, plan, "query_heads") == [3] * 3
    assert sizes(gqa, plan, "ffn") == [41] * 3
    assert sizes(gqa, plan, "layers") == [2]
    assert sizes(gqa, select(gqa, shape={"qk_dim": 6}), "qk_dim") == [3]
    assert select(gqa, shape={"hidden": 48, "heads": 2}).kept_units == {}


def test_unreachable_shapes_state_what_is_reachable(gqa: Program) -> None:
    assert "of which 1 to 2 can stay" in fail(gqa, shape={"heads": 5})
    assert "2 to 8 in steps of 2" in fail(gqa, shape={"qk_dim": 7})
    assert "1 to 48" in fail(gqa, shape={"hidden": 64})
    assert "1 to 3" in fail(gqa, shape={"layers": 4})
    assert "20 to 80" in fail(gqa, shape={"ffn": 10}, minimum=20)
    assert "is not a size" in fail(gqa, shape={"ffn": 0})
    assert "the same role" in fail(gqa, shape={"heads": 1, "kv_heads": 1})


def test_mistakes(gqa: Program) -> None:
    told = fail(gqa, remove={"experts": 0.5})
    assert "no role 'experts'" in told
    assert "ffn, hidden, kv_heads, layers" in told
    assert "exactly one" in fail(gqa)
    assert "remove and shape" in fail(gqa, remove={"ffn": 0.5}, shape={"ffn": 4})
    assert "fraction to remove" in fail(gqa, remove={"ffn": 1.0})
    assert "fraction to remove" in fail(gqa, remove={"ffn": -0.1})
    assert "fraction to remove" in fail(gqa, remove={"ffn": float("nan")})
    assert "the same role" in fail(gqa, remove={"heads": 0.5, "kv_heads": 0.5})
    assert "unknown aggregate" in fail(gqa, remove={"ffn": 0.5}, aggregate="median")
    assert "unknown normalize" in fail(gqa, remove={"ffn": 0.5}, normalize="z")
    assert "unknown role 'fnn'" in fail(gqa, remove={"ffn": 0.5}, align={"fnn": 8})
    assert "a whole number of at least 1" in fail(gqa, remove={"ffn": 0.5}, align=0)
    assert "minimum" in fail(gqa, remove={"ffn": 0.5}, minimum=0)
    assert "belongs to a target" in fail(gqa, remove={"ffn": 0.5}, roles=["ffn"])


def test_frozen_roles_are_told_with_their_reasons(gqa: Program) -> None:
    frozen = [s for s in gqa.structures if not s.prunable]
    told = fail(gqa, remove={"channels": 0.5})
    assert str(frozen[0].reason) in told
    structures = (
        Structure("x", "experts", 4, (), False, "sorted at moe.py:7", 0, 0),
        Structure("y", "channels", 1, (), True, None, 0, 0),
    )
    only = replace(gqa, structures=structures)
    assert "all are frozen: 1 x sorted at moe.py:7" in fail(only, remove={"experts": 0.5})
    assert "one unit" in fail(only, remove={"channels": 0.5})


def test_convolutions(convs: Program) -> None:
    plan = select(convs, remove={"*": 0.5})
    kept = plan.kept(convs)
    assert len(kept["stem.weight"][0]) == len(kept["norm.running_var"][0]) == 8
    assert len(kept["wide.weight"][0]) == len(kept["narrow.weight"][1]) == 20
    channels = kept["stem.weight"][0]
    assert kept["head.weight"][1].tolist() == [4 * c + i for c in channels for i in range(4)]
    # A channel is one position of most matrices, though four of the classifier's.
    stem = next(s for s in convs.structures if s.size == 16)
    assert Scope(convs).width(stem) == 1


def test_on_the_meta_device_units_tie() -> None:
    with torch.device("meta"):
        program = trace(
            nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (torch.ones(1, 2),)
        )
    with pytest.warns(UserWarning, match="meta device"):
        plan = select(program, remove={"ffn": 0.5})
    assert plan.kept_units == {"0.weight:0": (0, 1, 2, 3)}


def test_seeds(gqa: Program) -> None:
    plans = [select(gqa, remove={"ffn": 0.5}, score="random", seed=s) for s in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
