"""`torchrun -m graphprune compile`: several processes write what one writes, and end together."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.helpers import teach

ROOT = Path(__file__).parents[3]
RECIPE = """sparsify: {{method: sparsegpt, sparsity: 50%}}
calibration: {{data: {data}, general: 0, windows: 7, length: 16}}
"""

pytestmark = [
    pytest.mark.slow,  # every process imports torch and transformers
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks in /proc"),
]


@pytest.fixture(scope="module")
def taught(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that have learnt a text."""
    return teach(dense, tmp_path_factory.mktemp("taught") / "taught", layers=2)


@pytest.fixture
def recipe(tmp_path: Path, cycles: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=cycles))
    return path


@contextmanager
def torchrun(processes: int, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "graphprune", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        try:
            yield child
        finally:
            child.terminate()  # which ends its processes as well


def run(processes: int, *arguments: object) -> tuple[str, list[str]]:
    """What is printed, and what is told meanwhile."""
    with torchrun(processes, *arguments) as child:
        printed, told = child.communicate(timeout=600)
        assert child.returncode == 0, told
    return printed, told.splitlines()


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(output / "model.safetensors")
    return found


def process_of(rank: int, child: subprocess.Popen[str]) -> int:
    """The process of this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            variables = (folder / "environ").read_text().split("\0")
        except OSError:
            continue
        if int(parent) == child.pid and f"RANK={rank}" in variables:
            return int(folder.name)
    raise AssertionError(f"process {rank} isn't there")


def test_processes_write_what_one_writes(taught: Path, recipe: Path, tmp_path: Path) -> None:
    """Three processes; the first alone tells of stages, and prints."""
    run(1, "compile", taught, recipe, "-o", tmp_path / "one")
    printed, told = run(3, "compile", taught, recipe, "-o", tmp_path / "three")
    assert printed.count("verified: outputs match the masked model") == 1
    assert sum(line.startswith("pruning weights: group 5 of 8") for line in told) == 1
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert one.keys() == three.keys()
    for name in one:
        assert torch.equal(one[name] != 0, three[name] != 0)
        assert (one[name] - three[name]).norm() <= 1e-5 * one[name].norm()


def test_units_refits_and_training(taught: Path, recipe: Path, tmp_path: Path) -> None:
    """The same plan; weights that were trained on the same batches, whose gradients were added."""
    steps = """remove: {ffn: 0.25}
score: obs
repair: reconstruct
recover: {steps: 3, batch: 4, lr: 1.0e-3, loss: ce, precision: float32}
"""
    recipe.write_text(
        steps + recipe.read_text().splitlines()[1].replace("windows: 7", "windows: 9")
    )
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        run(processes, "compile", taught, recipe, "-o", output)
        plan = json.loads((output / "graphprune_plan.json").read_text())
        found.append((plan["structures"], weights(output)))
    (plan, one), (other_plan, two) = found
    assert plan == other_plan
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_an_error_is_told_once(taught: Path, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.format(data=tmp_path / "missing.txt"))
    begun = time.monotonic()
    with torchrun(2, "compile", taught, recipe, "-o", tmp_path / "slim") as child:
        _, told = child.communicate(timeout=600)
    assert child.returncode != 0
    assert told.count("error: ") == 1
    assert "missing.txt" in told
    assert time.monotonic() - begun < 300
    assert not (tmp_path / "slim").exists()


def test_one_is_killed_at_any_moment(taught: Path, recipe: Path, tmp_path: Path) -> None:
    """The others end, nothing is written, and the same run with --resume writes the same bytes."""
    whole, output = tmp_path / "whole", tmp_path / "output" / "slim"
    _, told = run(2, "compile", taught, recipe, "-o", whole)
    wanted = (whole / "model.safetensors").read_bytes()
    *stages, last = (line for line in told if line.endswith("..."))
    assert last == "putting the files in place ..."
    draw = random.Random(0)
    for turn in range(10):
        stage, rank = draw.choice(stages), turn % 2
        with torchrun(2, "compile", taught, recipe, "-o", output) as child:
            assert child.stderr is not None
            for line in child.stderr:
                if line.rstrip() == stage:
                    time.sleep(draw.random() / 4)
                    os.kill(process_of(rank, child), signal.SIGKILL)
                    killed = time.monotonic()
                    break
            rest = child.stderr.read()
            assert child.wait(timeout=60) != 0, stage
        assert time.monotonic() - killed < 60, stage
        assert not output.exists(), (stage, rest)
        run(
            2 if turn < 8 else 1 + turn % 2 * 2, "compile", taught, recipe, "-o", output, "--resume"
        )
        if turn < 8:  # with another number of processes the last bit may differ
            assert (output / "model.safetensors").read_bytes() == wanted, stage
        new, old = weights(output), weights(whole)
        assert all(torch.equal(new[name] != 0, old[name] != 0) for name in old), stage
        assert [path.name for path in output.parent.iterdir()] == ["slim"]
        shutil.rmtree(output)
