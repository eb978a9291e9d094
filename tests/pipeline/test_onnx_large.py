"""Models whose weights don't fit: what a compilation holds in memory at most."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_large import MIB, peak_of, write_large

# What the interpreter and the libraries need is counted in, and is about 220 MiB of this.
LIMIT = 600

COMMAND = "from graphprune.cli.app import main; main()"
STAGES = """
import sys
import onnxruntime
import graphprune as gp
import graphprune.pipeline.compiler
from onnx_large import anonymous
print(anonymous("self"))
source, out = sys.argv[1:]
program = gp.load(source)
plan = gp.select(program, remove={"ffn": 0.5, "hidden": 0.25})
slim = gp.apply(program, plan)
certificate = gp.verify(program, plan, slim)
certificate.raise_if_failed()
assert certificate.dense_difference > 1e-3
slim.save(out)
"""


def test_stages(tmp_path: Path) -> None:
    """Beside the libraries, all of it takes a small share of the weights."""
    source, size = write_large(tmp_path, blocks=3, hidden=1024, inner=4096, words=16384)
    out = tmp_path / "slim.onnx"
    peak = peak_of(["-c", STAGES, str(source), str(out)])
    libraries = float(peak.output)
    assert 50 < libraries < peak.anonymous < libraries + size / MIB / 4, peak
    graph = onnx.load(out, load_external_data=False).graph
    slim = {t.name: tuple(t.dims) for t in graph.initializer}
    assert slim["table"] == (16384, 768)
    assert slim["up2"] == (768, 2048)
    assert slim["down2"] == (2048, 768)
    _empty(tmp_path)


@pytest.mark.slow
def test_two_and_a_half_gigabytes(tmp_path: Path) -> None:
    """The whole command: load, check, plan, verify in ONNX Runtime, write."""
    source, size = write_large(tmp_path, blocks=40, hidden=1024, inner=6144, words=131072)
    assert size > 2.5e9
    out = tmp_path / "slim.onnx"
    flags = ["-o", str(out), "--remove", "ffn=0.5", "--score", "magnitude"]
    peak = peak_of(["-c", COMMAND, "compile", str(source), *flags])
    report = json.loads(Path(f"{out}.report.json").read_text())
    removed = report["before"]["parameters"] - report["after"]["parameters"]
    assert removed == 40 * 3072 * 2049
    graph = onnx.load(out, load_external_data=False).graph
    (up,) = (t for t in graph.initializer if t.name == "up39")
    place = {e.key: e.value for e in up.external_data}
    offset, shape = int(place["offset"]), (1024, 3072)
    found = np.memmap(tmp_path / place["location"], "<f4", "r", offset, shape)
    dense = {t.name: t for t in onnx.load(source, load_external_data=False).graph.initializer}
    offset = int({e.key: e.value for e in dense["up39"].external_data}["offset"])
    whole = np.memmap(tmp_path / "weights.bin", "<f4", "r", offset, (1024, 6144))
    places = {column: i for i, column in enumerate(whole[0])}
    columns = [places[value] for value in found[0]]
    np.testing.assert_array_equal(found, whole[:, columns])
    del found, whole
    _empty(tmp_path)
    assert peak.anonymous < LIMIT, peak


def _empty(folder: Path) -> None:
    """pytest would keep the files of three runs."""
    for file in folder.iterdir():
        file.unlink()
