"""SIGKILL and SIGTERM at every step of every kind of output: the older one is there, or the new."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import graphprune as gp
from files.kills import Act, attempt, compiled, every_step, visible
from graphprune.files import moves
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx import files as onnx_files
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, planned, weights

SIGNALS = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
# All steps take minutes, most of it for new processes; some of them show most faults.
EVERY = pytest.mark.parametrize(
    "every", [8, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
)
PLACES = pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
TEXT = "g (float[N,20] x) => (float[N,3] y) { h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }"
UNITS = {"older": range(0, 12), "newer": range(4, 14)}
"""What two plans keep of sixteen units."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """A process that has parted from one with threads can't use them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, SlimOnnx]:
    """Two slim models of one ONNX file, whose weights go to a second file."""
    monkeypatch.setattr(onnx_files, "STREAMED_ABOVE", 100)
    file = tmp_path / "dense.onnx"
    model = graph(TEXT, a=weights(20, 16), c=weights(16, 3))
    onnx.save(model, file, save_as_external_data=True, location="w.bin", size_threshold=0)
    program = load_onnx(file)
    return {
        name: SlimOnnx(program, planned(program, {("a", 1): tuple(units)}))
        for name, units in UNITS.items()
    }


@pytest.fixture
def modules() -> dict[str, gp.Slim]:
    """Two slim models of one module."""
    torch.manual_seed(0)
    program = gp.trace(Net().eval(), (torch.randn(2, 6),))
    (structure,) = (s for s in program.structures if s.prunable)
    plans = {
        name: gp.Plan(program.fingerprint, {structure.name: tuple(units)}, {structure.name: 16})
        for name, units in UNITS.items()
    }
    return {name: gp.apply(program, plan) for name, plan in plans.items()}


@PLACES
@SIGNALS
def test_a_text(tmp_path: Path, number: int, overwrite: bool) -> None:
    def make(version: str, output: Path) -> Act:
        return lambda: gp.Plan(version, {"x": (0, 1)}, {"x": 3}).save(output)

    assert every_step(make, "plan.json", tmp_path, number, overwrite) >= 8


@EVERY
@PLACES
@SIGNALS
def test_a_program_with_its_plan_and_its_report(
    tmp_path: Path, modules: dict[str, gp.Slim], number: int, overwrite: bool, every: int
) -> None:
    def make(version: str, output: Path) -> Act:
        return compiled(modules[version], output, "pt2")

    assert every_step(make, "slim.pt2", tmp_path, number, overwrite, every=every) >= 20


@EVERY
@PLACES
@SIGNALS
def test_an_onnx_file_with_a_second_one(
    tmp_path: Path, graphs: dict[str, SlimOnnx], number: int, overwrite: bool, every: int
) -> None:
    def make(version: str, output: Path) -> Act:
        return compiled(graphs[version], output, "onnx")

    assert every_step(make, "slim.onnx", tmp_path, number, overwrite, every=every) >= 20
    folder = tmp_path / "folder"
    attempt(make("newer", folder / "slim.onnx"), folder)
    assert len(visible(folder)) == 5  # the file, its data, the plan, the recipe, the report
    x = np.ones((2, 20), np.float32)
    found = onnxruntime.InferenceSession(folder / "slim.onnx").run(None, {"x": x})[0]
    kept = list(UNITS["newer"])
    wanted = np.maximum(x @ weights(20, 16)[:, kept], 0) @ weights(16, 3)[kept]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@EVERY
@PLACES
@SIGNALS
def test_a_directory(
    tmp_path: Path, modules: dict[str, gp.Slim], number: int, overwrite: bool, every: int
) -> None:
    def make(version: str, output: Path) -> Act:
        return compiled(modules[version], output, "pt2")

    assert every_step(make, "slim", tmp_path, number, overwrite, every=every) >= 15


@EVERY
@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=["kill", "term"],
)
def test_systems_that_lack_a_rename(
    tmp_path: Path,
    graphs: dict[str, SlimOnnx],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: str,
    links: bool,
    every: int,
) -> None:
    """Directories can't be exchanged there: an older one is put back by whoever comes next."""
    monkeypatch.setattr(moves, "renameat2", lambda: None)
    if not links:

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("graphprune.files.moves.os.link", refuse)

    def make(version: str, output: Path) -> Act:
        return compiled(graphs[version], output, "onnx")

    name = "slim.onnx" if kind == "file" else "slim"
    every_step(make, name, tmp_path, number, True, every=every, gap=kind == "directory")
