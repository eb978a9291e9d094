"""The error hierarchy and how it reads."""

import pickle

import pytest

from graphprune import errors


def test_message_says_what_where_why_and_what_to_do() -> None:
    error = errors.PlanError("No heads left.", where="model.layers.0", why="2 - 2 = 0", hint="less")
    assert str(error) == "No heads left.\n  where: model.layers.0\n  why: 2 - 2 = 0\n  do: less"


def test_parts_that_are_not_given_are_left_out() -> None:
    assert str(errors.LoadError("No such file.", hint="look again")) == (
        "No such file.\n  do: look again"
    )
    assert str(errors.LoadError("No such file.")) == "No such file."


@pytest.mark.parametrize(
    "kind",
    ["LoadError", "TraceError", "PlanError", "RecipeError", "VerifyError", "EmitError"],
)
def test_every_kind_is_a_graphprune_error(kind: str) -> None:
    assert issubclass(getattr(errors, kind), errors.GraphPruneError)


def test_an_error_survives_another_process() -> None:
    error = errors.VerifyError("They differ.", where="lm_head", why="0.5 > 1e-4", hint="report it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.VerifyError
    assert str(again) == str(error)
