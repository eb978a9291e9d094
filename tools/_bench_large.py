"""tools/bench large: commands on a model of seven billion weights, and the memory that they take.

Every command is a process of its own, which is watched from outside: what counts is memory that
belongs to no file, of one process and of all that a command starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _bench_large_model import SHAPES, Shape, write_model, write_tokenizer
from _bench_watch import Watched, watch
from _bootstrap import PYTHON, environment

GB = 10**9
BAR = 8 * GB
"""Memory of a process, at most."""

WINDOWS, LENGTH = 2, 256
"""Calibration windows, and tokens in each."""

PARTS = ("inspect", "cut", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Folder:
    """Where everything is: the model, the data, and what commands write."""

    path: Path

    @property
    def model(self) -> str:
        """The dense checkpoint."""
        return str(self.path / "model")

    def recipe(self, part: str) -> str:
        """The file of a recipe."""
        return str(self.path / f"{part}.yaml")

    def output(self, part: str) -> str:
        """What a compilation writes."""
        return str(self.path / part)


def main(options: argparse.Namespace) -> int:
    """Make the model once, run the commands; return the exit status."""
    shape = SHAPES[options.size]
    with _folder(options.folder) as folder:
        if not Path(folder.model).exists():
            write_model(Path(folder.model), shape)
            write_tokenizer(Path(folder.model))
        _write_recipes(folder, shape)
        size = 2 * shape.weights
        print(f"a random Llama, {shape.weights / GB:.2f} billion weights, {size / GB:.2f} GB")
        print(
            f"{'command':18s} {'peak GB':>8s} {'together':>9s} {'of weights':>11s} {'wall s':>8s}"
        )
        missed = False
        for part in options.parts or PARTS:
            for name, command in _commands(folder, part):
                missed |= not _report(name, _run(folder, name, command), size)
            shutil.rmtree(folder.output(part), ignore_errors=True)
    return int(missed)


def _report(name: str, seen: Watched, size: int) -> bool:
    """Print a line; whether the bar was reached."""
    print(
        f"{name:18s} {seen.memory / GB:8.2f} {seen.together / GB:9.2f} "
        f"{seen.memory / size:11.2f} {seen.seconds:8.0f}",
        flush=True,
    )
    if seen.code:
        print(f"{name} ended with {seen.code}:\n{seen.output[-2000:]}", flush=True)
    return not seen.code and seen.memory < BAR


def _run(folder: Folder, name: str, command: list[str]) -> Watched:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": str(folder.path)}
    full = [str(PYTHON), "-m", "graphprune", *command]
    return watch(full, environment() | threads, folder.path / f"{name.replace(' ', '-')}.log")


def _commands(folder: Folder, part: str) -> Iterator[tuple[str, list[str]]]:
    """Names and arguments of the commands of a part, each after the one ahead of it has run."""
    if part == "inspect":
        yield "inspect", ["inspect", folder.model]
        return
    output = folder.output(part)
    yield part, ["compile", folder.model, folder.recipe(part), "-o", output, "--overwrite"]
    yield f"verify {part}", ["verify", output]
    windows = ["--windows", str(WINDOWS), "--length", str(LENGTH)]
    yield f"eval {part}", ["eval", output, *windows]


def _write_recipes(folder: Folder, shape: Shape) -> None:
    """Recipes, and calibration data: windows of random tokens, each sixteen times."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(shape.vocabulary, (WINDOWS, LENGTH // 16), generator=generator)
    drawn = drawn.repeat_interleave(16, dim=1)
    data = folder.path / "windows.jsonl"
    lines = (json.dumps({"input_ids": window}) for window in drawn.tolist())
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = {"data": str(data), "windows": WINDOWS, "length": LENGTH}
    first = [f"model.layers.{i}.*" for i in range(4)]
    recipes = {
        "cut": {"remove": {"ffn": 0.25}, "score": "magnitude", "repair": "none"},
        "wanda": {"sparsify": {"method": "wanda", "sparsity": 0.5}, "calibration": given},
        "sparsegpt": {
            "sparsify": {"method": "sparsegpt", "sparsity": 0.5, "include": first},
            "calibration": given,
        },
    }
    for name, recipe in recipes.items():
        Path(folder.recipe(name)).write_text(json.dumps(recipe), encoding="utf-8")


@contextlib.contextmanager
def _folder(given: str) -> Iterator[Folder]:
    """A folder for everything: a temporary one, or the one that is given, which stays."""
    if given:
        path = Path(given).resolve()
        path.mkdir(parents=True, exist_ok=True)
        yield Folder(path)
        return
    with tempfile.TemporaryDirectory(prefix="graphprune-") as temporary:
        yield Folder(Path(temporary))
