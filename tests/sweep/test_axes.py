"""What a sweep varies, from the words of the command line."""

from __future__ import annotations

import pytest

from graphprune.errors import RecipeError
from graphprune.sweep.axes import settings


def points(**given):
    words = {name: given.pop(name, None) for name in ("score", "repair", "effort", "method")}
    sparsity = given.pop("sparsity", None)
    return settings(given, words, sparsity)


def test_a_budget_takes_several_values():
    found = points(target=["params=0.9,0.8, 0.7"])
    assert [one.flags for one in found] == [
        {"target": ["params=0.9"]},
        {"target": ["params=0.8"]},
        {"target": ["params=0.7"]},
    ]
    assert [one.label for one in found] == ["params=0.9", "params=0.8", "params=0.7"]


def test_keys_with_several_values_move_together_and_others_stay():
    found = points(remove=["ffn=10%,20%,heads=0,1/3", "model.layers.0.*/ffn=0.5"])
    assert [one.flags["remove"] for one in found] == [
        ["ffn=10%", "heads=0", "model.layers.0.*/ffn=0.5"],
        ["ffn=20%", "heads=1/3", "model.layers.0.*/ffn=0.5"],
    ]


def test_methods_make_a_series_each():
    found = points(target=["params=0.9,0.8"], score="obs,flap", repair="none")
    assert [(one.series, one.size) for one in found] == [
        ("score obs", "params=0.9"),
        ("score obs", "params=0.8"),
        ("score flap", "params=0.9"),
        ("score flap", "params=0.8"),
    ]
    assert found[2].flags == {"target": ["params=0.9"], "score": "flap", "repair": "none"}
    assert found[3].label == "score flap, params=0.8"


def test_masks_have_methods_and_shares():
    found = points(method="wanda,sparsegpt", sparsity="50%,60%")
    assert [one.flags["sparsify"] for one in found] == [
        {"method": "wanda", "sparsity": "50%"},
        {"method": "wanda", "sparsity": "60%"},
        {"method": "sparsegpt", "sparsity": "50%"},
        {"method": "sparsegpt", "sparsity": "60%"},
    ]
    assert all("method" not in one.flags for one in found)
    assert found[0].label == "wanda, 50% zero"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": ["params=0.9"], "remove": ["ffn=0.1"]}, "varies one goal"),
        ({"remove": ["ffn=0.1,0.2,heads=0.1,0.2,0.3"]}, "as many values"),
        ({"remove": ["0.1,0.2"]}, "name=number"),
        ({"remove": ["ffn="]}, "name=number"),
        ({"remove": ["ffn=0.1", "ffn=0.2"]}, "given twice"),
        ({"score": "obs,,flap"}, "empty word"),
        ({"score": "obs,obs"}, "given twice"),
    ],
)
def test_words_that_mean_nothing_are_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        points(**given)
