"""Passes by name: what is told of those that other packages add."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from graphprune import registry
from graphprune.errors import PlanError, RecipeError
from graphprune.passes.masks import ALLOCATIONS, METHODS
from graphprune.passes.repair import REPAIRS
from graphprune.passes.scores import SCORES, get_score
from graphprune.recipe.recipe import Recipe
from graphprune.registry import Registry

ALL = (SCORES, METHODS, ALLOCATIONS, REPAIRS)


@dataclass(frozen=True)
class Silent:
    """Says nothing of data."""

    width: int = 3


@dataclass(frozen=True)
class Blind(Silent):
    """Needs none."""

    needs_data: ClassVar[bool] = False


@dataclass(frozen=True)
class Seeing(Silent):
    """Needs some."""

    needs_data: ClassVar[bool] = True


def broken() -> None:
    raise RuntimeError("no driver")


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every registry has the same passes from another package."""
    made = {"silent": lambda: Silent, "blind": lambda: Blind, "seeing": lambda: Seeing,
            "broken": broken}  # fmt: skip
    points = [SimpleNamespace(name=n, value=f"mylib:{n}", load=load) for n, load in made.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


@pytest.mark.parametrize("found", ALL, ids=lambda r: r.kind)
def test_what_needs_no_data_says_so(found: Registry[Any]) -> None:
    """A registry knows of its own passes without importing them; the classes have the last word."""
    seen = {n for n in found.own if getattr(found.find(n), "needs_data", found.assumed)}
    assert seen == {n for n in found.own if found.needs_data(n)} == found.own.keys() - found.blind
    assert not found.needs_data("blind")
    assert found.needs_data("seeing")


def test_only_a_score_that_says_nothing_is_given_no_data() -> None:
    """Masks without statistics, allocations without samples would be wrong without a word."""
    assert [r.needs_data("silent") for r in ALL] == [False, True, True, True]


@pytest.mark.parametrize("found", ALL, ids=lambda r: r.kind)
def test_options(found: Registry[Any]) -> None:
    assert found.build("silent", {}) == Silent()
    assert found.build("silent", {"width": 5}) == Silent(5)
    for options, message in (
        ({"width": "wide"}, f"option 'width' of {found.kind} 'silent'"),
        ({"widht": 5}, "has no option 'widht'; did you mean 'width'"),
    ):
        with pytest.raises(ValueError, match=message):
            found.build("silent", options)
    with pytest.raises(ValueError, match="did you mean 'silent'"):
        found.known("silnt")
    assert {"silent", "blind", *found.own} <= set(found.names())


def test_whatever_importing_a_package_raises_is_told() -> None:
    with pytest.raises(PlanError, match="method 'broken' can't be loaded") as caught:
        METHODS.find("broken")
    assert caught.value.why == "RuntimeError: no driver"
    assert "mylib:broken" in str(caught.value.where)


def test_values_that_a_pass_refuses() -> None:
    """When the recipe is read, and from Python alike."""
    with pytest.raises(RecipeError, match="score 'obs': the score takes a damping from 0 to 1"):
        Recipe.parse({"remove": {"ffn": 0.5}, "score": {"name": "obs", "damping": 2}})
    with pytest.raises(PlanError, match="score 'obs': the score takes a damping from 0 to 1"):
        get_score({"name": "obs", "damping": 2})
