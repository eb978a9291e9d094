"""`graphprune inspect`: structures, costs, reasons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cli.helpers import Result, check_failure


def test_inspect_prints_structures_and_what_is_frozen(
    run: Callable[..., Result], dense: Path
) -> None:
    result = run("inspect", dense)
    assert result.code == 0, result.err
    assert "53,328 parameters" in result.out
    lines = {line.split()[0]: line for line in result.out.splitlines() if line}
    assert "model.layers.{0..2}.mlp" in lines["ffn"]
    assert lines["ffn"].split()[-3:-1] == ["64", "144"]
    assert {"hidden", "kv_heads", "layers"} <= lines.keys()
    assert "model.embed_tokens.weight:0" in result.out.partition("frozen:")[2]


def test_inspect_json(run: Callable[..., Result], dense: Path) -> None:
    data = json.loads(run("inspect", dense, "--json").out)
    assert (data["params"], data["bytes"]) == (53_328, 4 * 53_328)
    layers = [one for one in data["structures"] if one["role"] == "layers"]
    assert [one["size"] for one in layers] == [3]
    assert all(one["reason"] is None for one in data["structures"] if one["prunable"])


def test_inspect_why(run: Callable[..., Result], dense: Path) -> None:
    result = run("inspect", dense, "--why", "lm_head.weight")
    assert result.code == 0, result.err
    assert "frozen: indexed by values from outside" in result.out
    assert "prunable: hidden, 48 units" in result.out
    rows = json.loads(run("inspect", dense, "--why", "lm_head.weight", "--json").out)
    assert [row["size"] for row in rows] == [96, 48]
    check_failure(run("inspect", dense, "--why", "lm_head.wegt"), "did you mean 'lm_head.weight'?")
