"""Plans from files: one meaning or none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import graphprune as gp
from graphprune.errors import PlanError
from onnx_graphs import graph, weights, written


def plan_text(**changes: str) -> str:
    """A plan as JSON, some values replaced by other JSON."""
    parts = {"schema": "1", "fingerprint": '"a"', "kept": "[0, 2]", "size": "4", "more": ""}
    parts |= changes
    return (
        f'{{"schema": {parts["schema"]}, "fingerprint": {parts["fingerprint"]}, "structures": '
        f'{{"ffn": {{"size": {parts["size"]}, "kept": {parts["kept"]}}}}}{parts["more"]}}}'
    )


def test_a_plan_reads_back() -> None:
    plan = gp.Plan.from_json(plan_text())
    assert (plan.fingerprint, plan.kept_units, plan.sizes) == ("a", {"ffn": (0, 2)}, {"ffn": 4})
    rows = gp.Plan.from_json(plan_text(kept="[[0, 1], [2, 3]]"))
    assert rows.kept_units == {"ffn": ((0, 1), (2, 3))}
    assert gp.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": "[0.5, 1.7]"}, "0.5 is no unit"),
        ({"kept": "[0.0, 1.0]"}, "0.0 is no unit"),
        ({"kept": '"0123"'}, "'kept' is a string, not a list"),
        ({"kept": '["0", "1"]'}, "'0' is no unit"),
        ({"kept": "[true]"}, "True is no unit"),
        ({"kept": "[null]"}, "None is no unit"),
        ({"kept": "[NaN]"}, "NaN is no number"),
        ({"kept": "[1e999]"}, "inf is no unit"),
        ({"kept": "[-1, 0]"}, "unit -1 isn't one of 0 to 3"),
        ({"kept": "[0, 4]"}, "unit 4 isn't one of 0 to 3"),
        ({"kept": f"[{10**30}]"}, "isn't one of 0 to 3"),
        ({"kept": f"[{'1' * 5000}]"}, "thousands of digits"),
        ({"kept": "[2, 1]"}, "not ascending"),
        ({"kept": "[1, 1]"}, "not ascending"),
        ({"kept": "[[0, 1], 2]"}, "'kept' has lists, and 2 beside them"),
        ({"kept": "[0, [1]]"}, r"\[1\] is no unit"),
        ({"kept": "{}"}, "'kept' is an object"),
        ({"size": "4.0"}, "'size' is 4.0"),
        ({"size": '"4"'}, "'size' is '4'"),
        ({"size": "true"}, "'size' is True"),
        ({"size": "0"}, "'size' is 0"),
        ({"size": "null"}, "'size' is None"),
        ({"schema": "true"}, "'schema' is True"),
        ({"schema": "1.0"}, "'schema' is 1.0"),
        ({"schema": "2"}, "plan schema 2 is not supported"),
        ({"fingerprint": "5"}, "'fingerprint' is 5, not a string"),
        ({"more": ', "schema": 1'}, "the key 'schema' is given twice"),
        ({"more": ', "scheme": 1'}, "unknown key 'scheme'"),
        ({"size": '4, "size": 5'}, "the key 'size' is given twice"),
        ({"size": '4, "ragged": 5'}, "unknown key 'ragged'"),
    ],
)
def test_what_could_mean_something_else_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        gp.Plan.from_json(plan_text(**changes), "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 1, \xff}', "byte 14 is not UTF-8"),
        (b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b"", "no JSON"),
        (b"[]", "holds a list"),
        (b"3", "holds a number"),
        (b"remove: {ffn: 0.5}\n", "a recipe is given without --plan"),
        (b'{"source": "x", "kept": {}}', "give graphprune_plan.json, which lies beside it"),
        (b'{"schema": 1, "fingerprint": "a"}', "'structures' is missing"),
        (b'{"schema": 1, "fingerprint": "a", "structures": {"f": {}}}', "'kept' is missing"),
        (b'{"schema": 1, "fingerprint": "a", "structures": []}', "'structures' is a list"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        gp.Plan.load(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_plan_of_another_size_does_not_fit(tmp_path: Path) -> None:
    text = "g (float[N,50] x) => (float[N,3] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
    program = gp.load(str(written(graph(text, a=weights(50, 8), c=weights(8, 3)), tmp_path)))
    (structure,) = (s for s in program.structures if s.prunable)
    units = {structure.name: (0, 3)}
    assert gp.Plan(program.fingerprint, units, {structure.name: 8}).bind(program).keep
    assert gp.Plan(program.fingerprint, units).bind(program).keep
    for size in (7, 9, 16):
        with pytest.raises(PlanError, match=f"for {size} units, and the model has 8"):
            gp.Plan(program.fingerprint, units, {structure.name: size}).bind(program)


@pytest.mark.parametrize("units", [(0.5, 1.7), (True,), ("0", "1"), (0, 1.0)])
def test_units_are_whole_numbers_in_memory_too(units: tuple[object, ...]) -> None:
    with pytest.raises(PlanError, match="not whole numbers"):
        gp.Plan("a", {"ffn": units})  # type: ignore[dict-item]
    from_numpy = gp.Plan("a", {"ffn": tuple(np.array([0, 2]))})
    assert json.loads(gp.Plan("a", {"ffn": (0, 2)}).to_json())["structures"] == {
        "ffn": {"kept": [0, 2]}
    }
    assert from_numpy.kept_units["ffn"] == (0, 2)
