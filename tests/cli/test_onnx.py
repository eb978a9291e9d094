"""ONNX files on the command line, and what a compilation says of a proof that proves little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import graphprune as gp
from cli.helpers import Result, tree
from plan_files import units

HIDDEN = 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two Gemm layers of 12 hidden units, batch dynamic."""
    rng = np.random.default_rng(0)
    tensors = {
        "w1": rng.standard_normal((HIDDEN, 5)),
        "b1": rng.standard_normal(HIDDEN),
        "w2": rng.standard_normal((3, HIDDEN)),
        "b2": rng.standard_normal(3),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["a"]),
            helper.make_node("Gemm", ["a", "w2", "b2"], ["y"], transB=1),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 5])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "dense.onnx"
    onnx.save(model, path)
    return path


def test_compile_and_verify(run: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim.onnx"
    assert run("compile", str(source), "-o", str(out), "--remove", "ffn=0.25").code == 0
    shapes = {t.name: tuple(t.dims) for t in onnx.load(out).graph.initializer}
    assert shapes == {"w1": (9, 5), "b1": (9,), "w2": (3, 9), "b2": (3,)}
    report = json.loads(Path(f"{out}.report.json").read_text())
    assert report["before"]["parameters"] == 12 * 5 + 12 + 3 * 12 + 3
    assert report["after"]["parameters"] == 9 * 5 + 9 + 3 * 9 + 3
    assert report["after"]["macs"] == 9 * 5 + 3 * 9
    assert report["after"]["files"] == out.stat().st_size
    assert report["before"]["files"] == source.stat().st_size
    errors = json.loads(run("verify", str(out), "--json").out)
    assert errors["slim.onnx"] < 1e-5


def test_inspect(run: Callable[..., Result], source: Path) -> None:
    data = json.loads(run("inspect", str(source), "--json").out)
    (prunable,) = (s for s in data["structures"] if s["prunable"])
    assert (prunable["role"], prunable["size"], prunable["params"]) == ("ffn", 12, 5 + 1 + 3)
    why = json.loads(run("inspect", str(source), "--why", "w2", "--json").out)
    assert [row["size"] for row in why] == [3, 12]
    assert "model output" in why[0]["frozen"][0]


def test_a_plan_replays(run: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    run("compile", str(source), "-o", str(first), "--remove", "ffn=0.5")
    plan = f"{first}.graphprune_plan.json"
    assert run("compile", str(source), "-o", str(second), "--plan", plan).code == 0
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "hf"], "only be written as ONNX"),
        (["--format", "pt2"], "only be written as ONNX"),
        (["--score", "taylor"], "doesn't read token ids"),
    ],
)
def test_what_an_onnx_file_cannot_be(
    run: Callable[..., Result], source: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    before = tree(tmp_path)
    done = run("compile", str(source), "-o", str(tmp_path / "o"), "--remove", "ffn=0.5", *flags)
    assert done.code == 1
    assert message in done.err
    assert tree(tmp_path) == before


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_rounds(run: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    """As if the model had been written out in between."""
    both, first, then = (tmp_path / f"{n}.onnx" for n in ("both", "first", "then"))
    gp.compile(source, {"remove": {"ffn": 0.5}, "rounds": 2}, both)
    gp.compile(source, {"remove": {"ffn": 0.25}}, first)  # of 12 units 8.5 are to stay: 9
    gp.compile(first, {"shape": {"ffn": 6}}, then)
    found, wanted = tensors(both), tensors(then)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    kept = json.loads(Path(f"{both}.graphprune_plan.json").read_text())["structures"]
    (entry,) = kept.values()
    np.testing.assert_array_equal(found["w1"], tensors(source)["w1"][units(entry["kept"])])
    assert run("verify", both).code == 0


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_inputs_that_show_no_effect_are_told(tmp_path: Path, scale: float) -> None:
    head = nn.Linear(8, 3)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), head).eval()
    with torch.no_grad():
        head.weight.mul_(scale)
    report = gp.compile(
        module, {"remove": {"ffn": 0.5}}, tmp_path / "o.pt2", example=(torch.randn(2, 4),)
    )
    assert any("no effect" in note for note in report.notes) is (scale == 0)
