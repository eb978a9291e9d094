"""Which point a sweep suggests, on curves whose answer is plain."""

from __future__ import annotations

from graphprune.quality.conditions import parse_all
from graphprune.quality.measures import Measures
from graphprune.quality.perplexity import Perplexity
from graphprune.quality.result import Comparison, Estimate, Quality
from graphprune.sweep.result import Point
from graphprune.sweep.suggest import suggest

DENSE = Measures(parameters=1000)


def point(label: str, kept: float, ratio: float, agreement: float = 0.9) -> Point:
    after = Measures(
        parameters=round(1000 * kept), perplexities={"t": Perplexity(10 * ratio, 8, 2, 99, (1.0,))}
    )
    text = Comparison(2, 8, 14, Estimate(ratio), Estimate(agreement), Estimate(ratio - 1))
    return Point(label, label, "", after, Quality({"t": text}), recipe=f"recipe of {label}")


CURVE = [
    point("90", 0.9, 1.02),
    point("80", 0.8, 1.05),
    point("70", 0.7, 1.5, 0.7),
    point("60", 0.6, 3.0, 0.5),
]


def test_without_conditions_it_is_the_knee():
    found = suggest(CURVE, DENSE)
    assert found.label == "80"
    assert found.recipe == "recipe of 80"
    assert "knee" in found.reason


def test_under_conditions_it_is_the_smallest_that_none_rules_out():
    found = suggest(CURVE, DENSE, parse_all(["perplexity>+60%", "agreement<0.6"]))
    assert found.label == "70"
    assert "smallest model without perplexity>+60%, agreement<0.6" in found.reason


def test_where_all_are_ruled_out_nothing_is_suggested():
    found = suggest(CURVE, DENSE, parse_all(["perplexity>+1%"]))
    assert found.label is None
    assert found.recipe == ""


def test_a_curve_without_a_knee_has_the_mildest_cut():
    steep = [point("90", 0.9, 2.0), point("80", 0.8, 2.5), point("60", 0.6, 3.0)]
    assert suggest(steep, DENSE).label == "90"


def test_a_point_that_another_beats_in_both_is_no_candidate():
    worse = [*CURVE, point("worse", 0.85, 1.3)]
    assert suggest(worse, DENSE).label == "80"


def test_without_quality_nothing_is_suggested():
    bare = [Point("90", "90", "", Measures(parameters=900))]
    assert suggest(bare, DENSE).label is None
