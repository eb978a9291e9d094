"""`graphprune eval` on ONNX files: what is measured, and the share of the ideal speed-up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from cli.helpers import Result, check_failure
from graphprune.pipeline.compiler import compile as gp_compile
from onnx_graphs import graph, weights, written

WIDTH = 64


def attention(folder: Path, name: str = "dense.onnx", longest: int = 1024) -> Path:
    """Token ids to scores: an embedding, learned positions, two Gemm, and a product of lengths."""
    model = graph(
        """ g (int64[batch, length] ids) => (float[batch, length, 5] y) {
          x = Gather(table, ids)
          s = Shape(ids)
          n = Gather(s, one)
          p = Slice(places, zero, n, zero)
          h0 = Add(x, p)
          h = MatMul(h0, w1)
          r = Relu(h)
          o = MatMul(r, w2)
          t = Transpose<perm = [0, 2, 1]>(h0)
          a = MatMul(h0, t)
          c = MatMul(a, h0)
          z = Add(o, c)
          y = MatMul(z, w3)
        }""",
        table=weights(11, 8),
        places=weights(longest, 8),
        w1=weights(8, WIDTH),
        w2=weights(WIDTH, 8),
        w3=weights(8, 5),
        one=np.array([1]),
        zero=np.array([0]),
    )
    return written(model, folder, name)


def macs(length: int, width: int) -> int:
    return length * 8 * (2 * width + 2 * length + 5)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    dense, slim = attention(tmp_path), tmp_path / "slim.onnx"
    gp_compile(dense, {"remove": {"ffn": 0.75}}, slim)
    return dense, slim


def test_macs_are_those_of_the_call(run: Callable[..., Result], pair: tuple[Path, Path]) -> None:
    dense, slim = pair
    result = run("eval", slim, "--against", dense, "--length", 40, "--threads", 1, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    for path, width in ((dense, WIDTH), (slim, WIDTH // 4)):
        found = data[str(path)]
        assert found["inputs"] == {"ids": [1, 40]}
        assert found["macs"] == found["onnxruntime"]["macs"] == macs(40, width)
        assert found["onnxruntime"]["threads"] == 1
        assert found["onnxruntime"]["runtime"] == "onnxruntime"
        assert found["torch"] is None
    times = [data[str(path)]["onnxruntime"]["seconds"] for path in pair]
    speedup = data[str(slim)]["speedup"]["onnxruntime"]
    assert speedup["time"] == pytest.approx(times[0] / times[1])
    assert speedup["macs"] == pytest.approx(macs(40, WIDTH) / macs(40, WIDTH // 4))
    assert speedup["share"] == pytest.approx(speedup["time"] / speedup["macs"])
    assert "speedup" not in data[str(dense)]


def test_the_table_says_how(run: Callable[..., Result], pair: tuple[Path, Path]) -> None:
    dense, slim = pair
    result = run("eval", slim, "--against", dense, "--length", 24, "--threads", 1)
    assert result.code == 0, result.err
    ratio = macs(24, WIDTH) / macs(24, WIDTH // 4)
    assert re.search(
        rf"ONNX Runtime: (as fast as before|\d+\.\d\dx (fast|slow)er) with {ratio:.2f}x fewer MACs "
        r"\(\d+% of the ideal speed-up\)\n",
        result.out,
    )
    assert re.search(
        r"latency \(1 x 24 tokens\): median of \d+ calls or more in turns, 1 thread\n", result.out
    )
    assert result.out.count("inputs: ids [1, 24]") == 1
    assert "MACs (1 x 24 tokens)" in result.out
    assert f"{macs(24, WIDTH // 4):,}" in result.out
    alone = run("eval", slim, "--length", 24)
    assert "ideal" not in alone.out
    assert "in turns" not in alone.out


def test_a_model_that_takes_no_such_length(run: Callable[..., Result], tmp_path: Path) -> None:
    short = attention(tmp_path, longest=16)
    result = run("eval", short, "--length", 17, "--json")
    assert result.code == 0, result.err
    (found,) = json.loads(result.out).values()
    batch, length = found["inputs"]["ids"]
    assert length <= 16
    assert found["macs"] == batch * macs(length, WIDTH)


def test_what_only_onnx_runtime_understands(run: Callable[..., Result], tmp_path: Path) -> None:
    """The checker of onnx wants graphs to have a name."""
    path = attention(tmp_path)
    model = onnx.load(path)
    model.graph.name = ""
    broken = written(model, tmp_path, "broken.onnx")
    result = run("eval", broken, "--length", 16, "--json")
    assert result.code == 0, result.err
    (found,) = json.loads(result.out).values()
    assert found["onnxruntime"]["seconds"] > 0
    assert found["parameters"] == 11 * 8 + 1024 * 8 + 2 * 8 * WIDTH + 8 * 5
    assert found["macs"] is None
    assert found["onnxruntime"]["macs"] is None
    assert "multiply-accumulates are not known" in found["notes"][0]
    table = run("eval", path, "--against", broken, "--length", 16)
    assert "note: multiply-accumulates are not known" in table.out
    assert "ideal" not in table.out


def test_a_checkpoint_beside_an_onnx_file(
    run: Callable[..., Result], dense: Path, compiled: Path
) -> None:
    """Different runtimes: no ratio, and both sides as they are."""
    flags = ("--length", 16, "--windows", 2, "--json")
    result = run("eval", compiled / "model.onnx", "--against", dense, *flags)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data[str(compiled / "model.onnx")]["speedup"] == {}
    assert data[str(dense)]["torch"]["seconds"] > 0


def test_share_of_checkpoints(run: Callable[..., Result], dense: Path, compiled: Path) -> None:
    """MACs are those of the timed input, and not of the example that was traced."""
    flags = ("--length", 32, "--windows", 2, "--threads", 1, "--json")
    result = run("eval", compiled, "--against", dense, *flags)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    layers, head, hidden = 3, 8, 48
    for path, queries, kv, ffn in ((dense, 6, 3, 64), (compiled, 4, 2, 48)):
        linear = hidden * head * (2 * queries + 2 * kv) + 3 * hidden * ffn
        product = 2 * 32 * queries * head
        expected = 32 * (layers * (linear + product) + hidden * 96)
        assert data[str(path)]["torch"]["macs"] == pytest.approx(expected, rel=0.002)
    speedup = data[str(compiled)]["speedup"]["torch"]
    assert speedup["share"] == pytest.approx(speedup["time"] / speedup["macs"])


def test_compile_reports_the_share(compiled: Path, pair: tuple[Path, Path]) -> None:
    report = json.loads((compiled / "report.json").read_text())
    latency = report["run"]["latency"]
    assert latency["speedup"].keys() == {"torch", "onnxruntime"}
    before, after = latency["before"]["torch"], latency["after"]["torch"]
    assert latency["speedup"]["torch"]["macs"] == pytest.approx(before["macs"] / after["macs"])
    assert before["macs"] == report["before"]["macs"]
    report = json.loads(Path(f"{pair[1]}.report.json").read_text())
    assert report["run"]["latency"]["speedup"]["onnxruntime"]["macs"] == pytest.approx(
        report["before"]["macs"] / report["after"]["macs"]
    )


def test_files_that_are_not_there_or_not_onnx(run: Callable[..., Result], tmp_path: Path) -> None:
    check_failure(run("eval", tmp_path / "none.onnx"), "does not exist")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07garbage")
    check_failure(run("eval", broken), "can't open")
