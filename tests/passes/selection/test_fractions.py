"""What a fraction is of: all units of a role, once where structures multiply."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.passes.selection.select import select


@pytest.fixture(scope="module")
def deep(make_llama):
    return make_llama(hidden=16, ffn=24, heads=2, kv=1, layers=10)


EARLY = "model.layers.[0-4].*"


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("fraction", [1 / 3, 2 / 5, 0.5, 0.05, 0])
@pytest.mark.parametrize("role", ["layers", "attention_blocks", "mlp_blocks"])
def test_layers_that_have_to_stay_are_counted(deep, role, fraction, uniform):
    wanted = {1 / 3: 3, 2 / 5: 4, 0.5: 5, 0.05: 1, 0: 0}[fraction]
    for scope in ({"exclude": [EARLY]}, {"include": ["model.layers.[5-9].*"]}):
        plan = select(deep, remove={role: fraction}, score="random", uniform=uniform, **scope)
        kept = next(iter(plan.kept_units.values()), range(10))
        assert len(kept) == 10 - wanted
        assert set(kept) >= set(range(5))


def test_more_layers_than_may_go(deep):
    with pytest.raises(PlanError) as told:
        select(deep, remove={"layers": 0.6}, exclude=[EARLY])
    assert "6 of the 10 units with role 'layers' are to go, and only 5 may" in str(told.value)
    assert "at most 5/10" in str(told.value)
    with pytest.raises(PlanError, match="only 5 may"):
        select(deep, remove={"*": 0.6}, exclude=[EARLY])


def test_a_selector_counts_what_it_means(deep):
    remove = {"model.layers.[0-5].*/layers": 0.5}
    plan = select(deep, remove=remove, score="random", exclude=["model.layers.[0-2].*"])
    assert plan.kept_units == {"model.layers": (0, 1, 2, 6, 7, 8, 9)}
    with pytest.raises(PlanError, match=r"3 of the 6 units that .* only 2 may"):
        select(deep, remove=remove, exclude=["model.layers.[0-3].*"])


def test_floors_and_alignment_still_bound_a_fraction(deep):
    scope = {"exclude": ["model.layers.0.*"], "score": "random"}
    plan = select(deep, remove={"layers": 0.8}, minimum=4, **scope)
    assert len(plan.kept_units["model.layers"]) == 4
    plan = select(deep, remove={"layers": 0.5}, align={"layers": 4}, **scope)
    assert len(plan.kept_units["model.layers"]) == 4  # of 8 and 4, both as near, the smaller
    assert len(select(deep, shape={"layers": 3}, **scope).kept_units["model.layers"]) == 3


def test_widths_lose_their_fraction_wherever_they_may(deep):
    plan = select(deep, remove={"ffn": 0.25}, exclude=[EARLY])
    assert [len(k) for k in plan.kept_units.values()] == [18] * 5


class Normed(nn.Module):
    """Convolutions with a group norm between them."""

    def __init__(self, groups, channels=64, convolved=1):
        super().__init__()
        self.a = nn.Conv2d(3, channels, 3, padding=1)
        self.n = nn.GroupNorm(groups, channels)
        self.c = nn.Conv2d(channels, channels, 3, padding=1, groups=convolved)
        self.b = nn.Conv2d(channels, 5, 1)

    def forward(self, x):
        return self.b(torch.relu(self.c(torch.relu(self.n(self.a(x))))))


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 1)
        self.g = nn.Conv2d(16, 24, 1, groups=4)
        self.c = nn.Conv2d(24, 16, 3, groups=4, padding=1)
        self.b = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.g(torch.relu(self.a(x)))
        y = y.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)
        return self.b(torch.relu(self.c(torch.relu(y))))


class Unfolded(nn.Module):
    """A pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 32, 1)
        self.c = nn.Conv2d(8, 16, 1)
        self.b = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = nn.functional.pixel_shuffle(torch.relu(self.a(x)), 2)
        return self.b(torch.relu(self.c(y)))


def widths(program, plan):
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim).raise_if_failed()
    return {
        n: slim.weights[f"{n}.weight"].shape[0] for n in "agcb" if f"{n}.weight" in slim.weights
    }


@pytest.mark.parametrize("fraction", [0.25, 0.5])
@pytest.mark.parametrize(
    "module",
    [Normed(1), Normed(4), Normed(32), Normed(64), Normed(8, convolved=4), Normed(4, 64, 64),
     Shuffled(), Unfolded()],
    ids=["layer", "few", "many", "single", "grouped", "depthwise", "shuffle", "pixels"],
)  # fmt: skip
def test_half_of_the_channels_is_half(module, fraction):
    program = gp.trace(module.eval(), (torch.randn(2, 3, 8, 8),))
    dense = widths(program, select(program, remove={"channels": 0}))
    expected = {n: round(width * (1 - fraction)) for n, width in dense.items()} | {"b": 5}
    if isinstance(module, Shuffled) and fraction == 0.25:
        expected |= {"g": 12, "c": 8}  # they share a factor of 2, which has no finer steps
    for remove in ({"channels": fraction}, {"*": fraction}, {"*.weight:0/channels": fraction}):
        if next(iter(remove)) != "*.weight:0/channels" or not isinstance(module, Unfolded):
            assert widths(program, select(program, remove=remove)) == expected


@pytest.mark.parametrize("groups", [4, 16])
def test_a_size_is_that_of_the_dimension(groups):
    program = gp.trace(Normed(groups).eval(), (torch.randn(2, 3, 8, 8),))
    assert widths(program, select(program, shape={"channels": 48})) == {"a": 48, "c": 48, "b": 5}


def test_rounds_and_the_report_count_channels(tmp_path):
    module, example = Normed(4).eval(), (torch.randn(2, 3, 8, 8),)
    report = gp.compile(
        module, {"remove": {"channels": 0.5}, "rounds": 2}, tmp_path / "slim.pt2", example=example
    )
    assert report.kept == {"channels": (64, 128)}
    slim = torch.export.load(tmp_path / "slim.pt2")
    assert slim.state_dict["a.weight"].shape[0] == 32
    assert slim.state_dict["c.weight"].shape[:2] == (32, 32)
