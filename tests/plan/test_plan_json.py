"""Plans from files: one meaning or none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.plan.notes import Notes, ScoreSummary
from graphprune.plan.ranges import parse_ranges, ranges_text
from onnx_graphs import graph, weights, written
from plan_files import units


def plan_text(**changes: str) -> str:
    """A plan as JSON, some values replaced by other JSON."""
    parts = {
        "schema": "2", "fingerprint": '"a"', "kept": '"0, 2"', "size": "4", "count": "2",
        "entry": "", "more": "",
    }  # fmt: skip
    parts |= changes
    return (
        f'{{"schema": {parts["schema"]}, "fingerprint": {parts["fingerprint"]}, "structures": '
        f'{{"ffn": {{"size": {parts["size"]}, "count": {parts["count"]}, "kept": {parts["kept"]}'
        f"{parts['entry']}}}}}{parts['more']}}}"
    )


def test_a_plan_reads_back() -> None:
    plan = gp.Plan.from_json(plan_text())
    assert (plan.fingerprint, plan.kept_units, plan.sizes) == ("a", {"ffn": (0, 2)}, {"ffn": 4})
    rows = gp.Plan.from_json(plan_text(kept='["0-1", "2-3"]'))
    assert rows.kept_units == {"ffn": ((0, 1), (2, 3))}
    assert gp.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("kept", "count", "expected"),
    [
        ("0-3", 4, (0, 1, 2, 3)),
        ("0-1,2,3", 4, (0, 1, 2, 3)),
        (" 0 ,  2-3 ", 3, (0, 2, 3)),
        ("2-2", 1, (2,)),
        ("", 0, ()),
    ],
)
def test_what_people_write(kept: str, count: int, expected: tuple[int, ...]) -> None:
    plan = gp.Plan.from_json(plan_text(kept=json.dumps(kept), count=str(count)))
    assert plan.kept_units["ffn"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": '"0.5"'}, "'0.5' is no range of units"),
        ({"kept": '"0:2"'}, "'0:2' is no range of units"),
        ({"kept": '"0, 2,"'}, "'' is no range of units"),
        ({"kept": '"-1"'}, "'-1' is no range of units"),
        ({"kept": '"+1"'}, "no range of units"),
        ({"kept": '"1 - 2"'}, "no range of units"),
        ({"kept": '"0\\n, 2"'}, "no range of units"),
        ({"kept": '"01"'}, "'01' is no range of units"),
        ({"kept": '"1-"'}, "'1-' is no range of units"),
        ({"kept": '"\\u0663"'}, "no range of units"),  # a digit three of another script
        ({"kept": f'"{"1" * 5000}"'}, "no range of units"),
        ({"kept": '"0-4"'}, "unit 4 isn't one of 0 to 3"),
        ({"kept": f'"0-{10**17}"'}, "isn't one of 0 to 3"),
        ({"kept": f'"0-{10**17}"', "size": str(10**18)}, "more than 33,554,432 units"),
        ({"kept": '"2-1"'}, "the range 2-1 descends"),
        ({"kept": '"2, 1"'}, "1 comes after 2; ranges are ascending"),
        ({"kept": '"1, 1"'}, "1 and 1 overlap"),
        ({"kept": '"0-2, 2-3"'}, "0-2 and 2-3 overlap"),
        ({"kept": '"1-2, 0-3"'}, "1-2 and 0-3 overlap"),
        ({"kept": '"0-2"'}, "has 3 units, and 'count' is 2"),
        ({"kept": '["0-1", "1-3"]'}, "list 1 of 'kept' has 3 units, and 'count' is 2"),
        ({"kept": '["0-1", "3-2"]'}, "list 1 of 'kept': the range 3-2 descends"),
        ({"kept": "[0, 2]"}, "'kept' has 0 in it; units are written as ranges"),
        ({"kept": "[[0, 2]]"}, r"'kept' has \[0, 2\] in it"),
        ({"kept": "[]"}, "'kept' has no ranges in it"),
        ({"kept": '["0-1", 2]'}, "'kept' has 2 in it"),
        ({"kept": "2"}, "'kept' is a number"),
        ({"kept": "{}"}, "'kept' is an object"),
        ({"kept": "null"}, "'kept' is null"),
        ({"count": "2.0"}, "'count' is 2.0"),
        ({"count": "true", "kept": '"0"'}, "'count' is True"),
        ({"count": "-1"}, "'count' is -1"),
        ({"size": "4.0"}, "'size' is 4.0"),
        ({"size": '"4"'}, "'size' is '4'"),
        ({"size": "true"}, "'size' is True"),
        ({"size": "0"}, "'size' is 0"),
        ({"size": "null"}, "'size' is None"),
        ({"schema": "true"}, "'schema' is True"),
        ({"schema": "2.0"}, "'schema' is 2.0"),
        ({"schema": "3"}, "plan schema 3 is not supported"),
        ({"fingerprint": "5"}, "'fingerprint' is 5, not a string"),
        ({"more": ', "schema": 2'}, "the key 'schema' is given twice"),
        ({"more": ', "scheme": 2'}, "unknown key 'scheme'"),
        ({"size": '4, "size": 5'}, "the key 'size' is given twice"),
        ({"entry": ', "ragged": 5'}, "unknown key 'ragged'"),
        ({"entry": ', "role": 5'}, "'role' is 5"),
        ({"entry": ', "parameters": "w"'}, "'parameters' is 'w'"),
        ({"entry": ', "parameters": [1]'}, r"'parameters' is \[1\]"),
        ({"entry": ', "scores": []'}, "'scores' is a list"),
        ({"entry": ', "scores": {"best": 1}'}, "unknown key 'best'"),
        ({"entry": ', "scores": {"kept_share": true}'}, "'kept_share' is True"),
        ({"entry": ', "scores": {"kept_share": 1e999}'}, "'kept_share' is inf"),
        ({"entry": f', "scores": {{"kept_share": {10**400}}}'}, "'kept_share' is 1000"),
    ],
)
def test_what_could_mean_something_else_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        gp.Plan.from_json(plan_text(**changes), "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 2, \xff}', "byte 14 is not UTF-8"),
        (b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b"", "no JSON"),
        (b"[]", "holds a list"),
        (b"3", "holds a number"),
        (b"remove: {ffn: 0.5}\n", "a recipe is given without --plan"),
        (b'{"source": "x", "kept": {}}', "give graphprune_plan.json, which lies beside it"),
        (b'{"schema": 2, "fingerprint": "a"}', "'structures' is missing"),
        (b'{"schema": 2, "fingerprint": "a", "structures": {"f": {}}}', "'count' is missing"),
        (b'{"schema": 2, "fingerprint": "a", "structures": []}', "'structures' is a list"),
        (
            b'{"schema": 1, "fingerprint": "a", "structures": {"f": {"kept": [0, 2]}}}',
            'schema 1 is not supported(.|\n)*as ranges, "0-11, 13": make the plan again',
        ),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        gp.Plan.load(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


UNITS = st.sets(st.integers(0, 60)).map(lambda found: tuple(sorted(found)))
RAGGED = st.integers(1, 5).flatmap(
    lambda count: st.lists(
        st.sets(st.integers(0, 60), min_size=count, max_size=count).map(lambda s: tuple(sorted(s))),
        min_size=1,
        max_size=4,
    ).map(tuple)
)
NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
NOTES = st.builds(
    Notes,
    st.text(),
    st.lists(st.text(), max_size=3).map(tuple),
    st.none() | st.builds(ScoreSummary, NUMBERS, NUMBERS, NUMBERS),
)


@given(
    st.text(),
    st.dictionaries(st.text(), st.tuples(UNITS | RAGGED, st.none() | st.integers(61), NOTES)),
)
def test_every_plan_reads_back(fingerprint: str, structures: dict[str, tuple]) -> None:
    """The text says what the plan does, to our reader and to another one."""
    plan = gp.Plan(
        fingerprint,
        {name: kept for name, (kept, _, _) in structures.items()},
        {name: size for name, (_, size, _) in structures.items() if size is not None},
        {name: notes for name, (_, _, notes) in structures.items() if notes != Notes()},
    )
    text = plan.to_json()
    read = gp.Plan.from_json(text)
    assert read == plan
    assert read.notes == plan.notes
    assert read.to_json() == text
    said = json.loads(text)
    assert list(said["structures"]) == list(structures)
    for name, (kept, size, _) in structures.items():
        entry = said["structures"][name]
        assert units(entry["kept"]) == [list(k) if isinstance(k, tuple) else k for k in kept]
        assert entry.get("size") == size


@given(st.sets(st.integers(0, 10**6), max_size=50))
def test_ranges_say_the_same(found: set[int]) -> None:
    wanted = tuple(sorted(found))
    text = ranges_text(wanted)
    assert parse_ranges(text, None) == wanted
    assert tuple(units(text)) == wanted


def test_a_range_takes_no_memory_before_it_is_known_to_fit() -> None:
    text = plan_text(kept=f'"0-{10**9}"', size=str(10**10), count=str(10**9 + 1))
    with pytest.raises(PlanError, match="more than"):
        gp.Plan.from_json(text)
    rows = json.dumps(["0-9999999"] * 4)
    with pytest.raises(PlanError, match="list 3 of 'kept': it has more than"):
        gp.Plan.from_json(plan_text(kept=rows, size=str(10**7), count=str(10**7)))


def test_a_structure_takes_a_few_lines() -> None:
    kept = tuple(u for u in range(1536) if u % 4)
    plan = gp.Plan(
        "a", {f"layer.{i}": kept for i in range(30)}, {f"layer.{i}": 1536 for i in range(30)}
    )
    lines = plan.to_json().splitlines()
    assert len(lines) == 30 * 5 + 6
    assert gp.Plan.from_json("\n".join(lines)) == plan


def test_lists_of_other_lengths_are_no_plan_to_be_saved() -> None:
    plan = gp.Plan("a", {"heads": ((0,), (0, 1))})
    with pytest.raises(PlanError, match="same number of units"):
        plan.to_json()


def test_the_notes_of_a_selection(tmp_path: Path) -> None:
    """Scores are the sums of magnitudes here, divided by their mean."""
    text = "g (float[N,50] x) => (float[N,3] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
    a, c = weights(50, 8), weights(8, 3, seed=1)
    program = gp.load(str(written(graph(text, a=a, c=c), tmp_path)))
    plan = gp.select(program, remove={"*": 0.5}, score={"name": "magnitude", "norm": "l1"})
    plan.save(tmp_path / "plan.json")
    (entry,) = json.loads((tmp_path / "plan.json").read_text())["structures"].values()
    scores = np.abs(a).sum(0) + np.abs(c).sum(1)
    scores = np.sort(scores / scores.mean())
    assert entry["parameters"] == ["a:1", "c:0"]
    assert entry["role"] == program.by_name[next(iter(plan.kept_units))].role
    assert (entry["size"], entry["count"]) == (8, 4)
    assert entry["scores"] == {
        "lowest_kept": pytest.approx(scores[4], rel=1e-3),
        "highest_removed": pytest.approx(scores[3], rel=1e-3),
        "kept_share": pytest.approx(scores[4:].sum() / scores.sum(), rel=1e-3),
    }


def test_a_plan_of_another_size_does_not_fit(tmp_path: Path) -> None:
    text = "g (float[N,50] x) => (float[N,3] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
    program = gp.load(str(written(graph(text, a=weights(50, 8), c=weights(8, 3)), tmp_path)))
    (structure,) = (s for s in program.structures if s.prunable)
    kept = {structure.name: (0, 3)}
    assert gp.Plan(program.fingerprint, kept, {structure.name: 8}).bind(program).keep
    assert gp.Plan(program.fingerprint, kept).bind(program).keep
    for size in (7, 9, 16):
        with pytest.raises(PlanError, match=f"for {size} units, and the model has 8"):
            gp.Plan(program.fingerprint, kept, {structure.name: size}).bind(program)


@pytest.mark.parametrize("kept", [(0.5, 1.7), (True,), ("0", "1"), (0, 1.0)])
def test_units_are_whole_numbers_in_memory_too(kept: tuple[object, ...]) -> None:
    with pytest.raises(PlanError, match="not whole numbers"):
        gp.Plan("a", {"ffn": kept})  # type: ignore[dict-item]
    from_numpy = gp.Plan("a", {"ffn": tuple(np.array([0, 2]))})
    assert json.loads(from_numpy.to_json())["structures"] == {"ffn": {"count": 2, "kept": "0, 2"}}
    assert from_numpy.kept_units["ffn"] == (0, 2)
