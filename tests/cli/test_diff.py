"""``graphprune diff`` on plans made by hand, and on two outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import graphprune as gp
from cli.helpers import Result
from onnx_graphs import graph, weights

TEXT = "g (float[N,20] x) => (float[N,3] y) { h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }"


def entry(kept: str | list[str], count: int, size: int | None = 8, role: str = "ffn") -> Any:
    return {"role": role, **({"size": size} if size else {}), "count": count, "kept": kept}


def plan(path: Path, fingerprint: str = "f", **structures: Any) -> Path:
    data = {"schema": 2, "fingerprint": fingerprint, "structures": structures}
    path.write_text(json.dumps(data))
    return path


def test_units_on_either_side(run: Callable[..., Result], tmp_path: Path) -> None:
    """A structure that one plan doesn't list is whole there."""
    a = plan(
        tmp_path / "a.json",
        up=entry("0-3, 6", 5),
        down=entry("0-6", 7),
        heads=entry(["0-1", "1-2"], 2, 3, "query_heads"),
        same=entry("1, 3", 2),
    )
    b = plan(
        tmp_path / "b.json",
        up=entry("2-5", 4),
        heads=entry("0-1", 2, 3, "query_heads"),
        same=entry("1, 3", 2),
    )
    result = run("diff", a, b, "--json", "--verbose")
    assert result.code == 1
    found = json.loads(result.out)
    assert (found["same"], found["same_model"]) == (False, True)
    assert found["roles"] == {
        "ffn": {"only_a": 3, "only_b": 3, "both": 2 + 7 + 2},
        "query_heads": {"only_a": 1, "only_b": 1, "both": 3},
    }
    assert found["structures"]["up"] == {
        "role": "ffn",
        "sizes": [8, 8],
        "only_a": 3,
        "only_b": 2,
        "both": 2,
        "units": {"only_a": "0-1, 6", "only_b": "4-5", "both": "2-3"},
    }
    assert found["structures"]["down"]["units"] == {"only_a": "", "only_b": "7", "both": "0-6"}
    assert found["structures"]["heads"]["units"] == {
        "only_a": ["", "2"],
        "only_b": ["", "0"],
        "both": ["0-1", "1"],
    }
    assert found["unmatched"] == {"a": [], "b": []}
    assert "units" not in json.loads(run("diff", a, b, "--json").out)["structures"]["up"]

    shown = run("diff", a, b, "-v")
    assert shown.code == 1
    assert "the plans differ" in shown.out
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["ffn:", "2", "of", "3", "structures", "differ", "3", "3", "11"] in lines
    assert ["up", "8", "3", "2", "2"] in lines
    assert ["only", "in", "A:", "0-1,", "6"] in lines
    assert ["only", "in", "B", "1:", "0"] in lines
    assert not any(line[:1] == ["same"] for line in lines)


def test_plans_that_are_the_same(run: Callable[..., Result], tmp_path: Path) -> None:
    """What is for people only makes no difference, and neither does a structure that is whole."""
    a = plan(tmp_path / "a.json", up=entry("0-3", 4), down=entry("0-7", 8))
    b = plan(tmp_path / "b.json", up=entry("0, 1, 2-3", 4, role="other"))
    result = run("diff", a, b)
    assert result.code == 0
    assert "the plans are the same" in result.out


def test_plans_of_different_models(run: Callable[..., Result], tmp_path: Path) -> None:
    a = plan(tmp_path / "a.json", up=entry("0-3", 4), mine=entry("0", 1), odd=entry(["0", "1"], 1))
    b = plan(
        tmp_path / "b.json",
        "g",
        up=entry("0-3", 4, 16),
        yours=entry("0", 1),
        odd=entry(["0", "0", "1"], 1),
    )
    result = run("diff", a, b, "--json")
    assert result.code == 1
    found = json.loads(result.out)
    assert (found["same"], found["same_model"]) == (False, False)
    assert found["fingerprints"] == ["f", "g"]
    assert list(found["structures"]) == ["up"]
    assert found["structures"]["up"]["sizes"] == [8, 16]
    assert found["unmatched"] == {"a": ["mine", "odd"], "b": ["odd", "yours"]}
    shown = run("diff", a, b).out
    assert "different models (fingerprints f and g)" in shown
    assert "1 structures are matched by name" in shown
    assert "8 / 16" in shown


def test_trouble_is_no_difference(run: Callable[..., Result], tmp_path: Path) -> None:
    a = plan(tmp_path / "a.json", up=entry("0-3", 4, size=None))
    b = plan(tmp_path / "b.json")
    (tmp_path / "broken.json").write_text('{"schema": 1}')
    (tmp_path / "empty").mkdir()
    for other, message in (
        (tmp_path / "none.json", "no such output or plan"),
        (tmp_path / "broken.json", "plan schema 1 is not supported"),
        (tmp_path / "empty", "can't read the plan"),
        (b, "a plan doesn't say how many units a structure has"),
        (plan(tmp_path / "c.json", up=entry("0-3", 4, 10**12)), "no structure has 1,000,000,000"),
    ):
        result = run("diff", a, other)
        assert (result.code, result.out) == (2, "")
        assert f"error: {message}" in result.err
        assert "Traceback" not in result.err
    assert run("diff", a).code == 2


@pytest.mark.parametrize("single", [False, True], ids=["directories", "files"])
def test_two_outputs(run: Callable[..., Result], tmp_path: Path, single: bool) -> None:
    source, other = tmp_path / "dense.onnx", tmp_path / "other.onnx"
    onnx.save(graph(TEXT, a=weights(20, 16), c=weights(16, 3)), source)
    onnx.save(graph(TEXT, a=weights(20, 16, seed=5), c=weights(16, 3)), other)
    a, b = (tmp_path / f"{name}{'.onnx' if single else ''}" for name in "ab")
    gp.compile(source, {"remove": {"*": 0.5}}, a)
    gp.compile(other, {"remove": {"*": 0.25}, "align": 2}, b, seed=3)
    found = json.loads(run("diff", a, b, "--json").out)
    assert found["same_model"]  # of the same shapes
    ((_, structure),) = found["structures"].items()
    assert structure["only_a"] + structure["both"] == 8
    assert structure["only_b"] + structure["both"] == 12
    assert found["recipe"] == {"remove.*": [0.5, 0.25], "align": [None, {"*": 2}], "seed": [0, 3]}
    assert set(found["provenance"]) == {"seed", "source.sha256"}
    assert found["numbers"]["parameters"] == [8 * 23, 12 * 23]
    assert found["numbers"]["latency.onnxruntime.seconds"][0] > 0
    shown = run("diff", a, b)
    assert shown.code == 1
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["parameters", "184", "276", "1.500"] in lines
    assert ["recipe:", "remove.*:", "0.5", "/", "0.25"] in lines
    assert ["made", "with:", "seed:", "0", "/", "3"] in lines

    same = run("diff", a, a)
    assert same.code == 0
    assert "recipe:" not in same.out
    file = f"{a}.graphprune_plan.json" if single else a / "graphprune_plan.json"
    assert json.loads(run("diff", a, file, "--json").out)["recipe"] == {}
