"""Small graphs that random ones were reduced to, each of which failed once."""

from __future__ import annotations

import pytest

import graphprune as gp
from properties.check import check, examine, trace
from properties.recipe import Recipe

IMAGE = ((2, 3, 4, 4),)
ROWS = ((2, 4, 6),)


def after_linear(name: str) -> Recipe:
    """A form of a linear's outputs between two linears."""
    return Recipe(
        ROWS, (("linear", (0,), 6, True), ("form", (1,), name), ("linear", (2,), 3, True)), (3,)
    )


FOUND = {
    # The sizes come from another tensor, so the result has its axes.
    "expand_as": after_linear("expand_as"),
    "reshape_as": after_linear("reshape_as"),
    # There was no rule.
    "take_along_dim": after_linear("take along"),
    "take_along_dim broadcasts": after_linear("take one"),
    # The repeats were counted from the first dimension, not from the last.
    "tile of the last dimension": after_linear("tile"),
    # The length came out as 0.
    "narrow from the end": after_linear("narrow from the end"),
    # The places that stay were a constant in float32, which float64 doesn't agree with.
    "linspace": after_linear("ramp"),
    # A dimension with a single unit left was squeezed too.
    "squeeze without dimensions": after_linear("squeeze all"),
    "squeeze that does nothing": after_linear("squeeze none"),
    # A sum over one of two equal axes left it open which of them has a subset for each index.
    "ragged within one of two": Recipe(
        ((2, 3, 4, 4),),
        (
            ("conv", (0,), 6, 1, 1, 1),
            ("form", (1,), "tensordot"),
            ("form", (2,), "eye"),
            ("flatten", (3,), 1, -1),
            ("linear", (4,), 2, True),
        ),
        (5,),
    ),
    # The initial state, which torch makes of the batch's size, had a batch of its own.
    "cell over a pruned batch": Recipe(
        (("ids", 10, 5, 4), (5, 4, 6)),
        (
            ("param", (), 5, 3, 5),
            ("cell", (2,), "rnn", 4),
            ("linear", (3,), 3, True),
            ("reduce", (4,), "sum", (0,)),
        ),
        (5,),
    ),
    "layer over a pruned batch": Recipe(
        (("ids", 10, 5, 4),),
        (
            ("param", (), 5, 3, 5),
            ("recurrent", (1,), "lstm", 4),
            ("linear", (2,), 3, True),
            ("reduce", (3,), "sum", (0,)),
        ),
        (4,),
    ),
    # Its definition depends on how the values lie in memory, which the sizes were tried without.
    "ravel of a transposed image": Recipe(
        IMAGE,
        (
            ("conv", (0,), 6, 3, 1, 1),
            ("transpose", (1,), 3, 2),
            ("spelled", (2,), "ravel"),
            ("linear", (3,), 2, True),
            ("reduce", (4,), "sum", (1,)),
        ),
        (5,),
    ),
    # torch takes an LSTM whose two sizes are equal for one without projections.
    "lstm with projections": Recipe(
        ROWS, (("projected", (0,), 6, 3), ("linear", (1,), 3, True)), (2,)
    ),
}


FROZEN = {
    # The rewriter looked for a size that a view as another dtype doesn't have.
    "view of the bits": after_linear("bits"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_found_and_frozen(name: str) -> None:
    program = trace(FROZEN[name])
    assert not any(s.prunable for s in program.structures)
    assert "bits" in program.frozen()["m0.weight", 0]
    empty = gp.Plan(program.fingerprint, {}, {})
    check(FROZEN[name], program, empty)  # in float64, whose bits are others


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    assert examine(FOUND[name], count=12), "no plan was tried"


@pytest.mark.parametrize("name", FOUND)
def test_something_can_be_pruned(name: str) -> None:
    assert any(s.prunable for s in trace(FOUND[name]).structures)


@pytest.mark.parametrize("name", ["std", "std_mean"])
def test_a_spread_needs_two_units(name: str) -> None:
    """One unit alone made it NaN, which `verify` refused."""
    steps = (("linear", (0,), 6, True), ("form", (1,), name))
    program = trace(Recipe(ROWS, steps, (2,)))
    assert [s.minimum for s in program.structures if s.prunable] == [2]
    assert examine(Recipe(ROWS, steps, (2,)), count=8) == 8
