"""What can be wrong with a command for a real model, told before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cli.helpers import Result, check_failure, tree
from models.cache import model_path

SECONDS = 2.0
"""Of CPU time, from the start of the process on."""

_DRIVER = """
import os, sys
from graphprune.cli.app import main
try:
    main(sys.argv[2:])
finally:
    with open(sys.argv[1], "w") as file:
        file.write(" ".join(name for name in ("torch", "transformers") if name in sys.modules))
"""


class Ended(NamedTuple):
    result: Result
    seconds: float
    imported: str


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with files that a command may name, right and wrong ones."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "good.txt").write_text("It was the best of times, it was the worst of times. " * 400)
    (work / "short.txt").write_text("Too short for a window of tokens.")
    (work / "empty.txt").write_text("")
    (work / "latin.txt").write_bytes("Ein Gr\u00fc\u00df.".encode("latin-1") * 1000)
    (work / "records.jsonl").write_text('{"body": "some text"}\n' * 100)
    (work / "weights.pt").write_bytes(b"pickled")
    (work / "photos").mkdir()
    (work / "photos" / "a.png").write_bytes(b"\x89PNG")
    (work / "nothing").mkdir()
    np.save(work / "ids.npy", np.arange(4096).reshape(8, 512))
    (work / "recipe.yaml").write_text("remov: {ffn: 0.25}\n")
    (work / "model.onnx").write_bytes(b"onnx")
    (work / "file").write_text("no directory")
    (work / "full").mkdir()
    (work / "full" / "mine.txt").write_text("mine")
    name = "model.layers.0.mlp.gate_proj.weight:0"
    entry = {"size": 2560, "count": 1000, "kept": "0-999"}
    plan = {"schema": 2, "fingerprint": "0123456789abcdef", "structures": {name: entry}}
    (work / "plan.json").write_text(json.dumps(plan))
    return work


def told(work: Path, arguments: Sequence[object]) -> Ended:
    """Run a command in a process of its own."""
    words = [sys.executable, "-c", _DRIVER, work.parent / "imported", *arguments]
    with subprocess.Popen(
        [str(word) for word in words],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    imported = (work.parent / "imported").read_text()
    return Ended(Result(process.returncode, out, err), used.ru_utime + used.ru_stime, imported)


FFN = ("--remove", "ffn=0.25")

MISTAKES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "no source": (("SOURCE/../smollm2-v2", *FFN), ("no such file or directory", "did you mean")),
    "no such name on the hub": (
        ("HuggingFaceTB/SmolLM2-153M", *FFN),
        ("model hub doesn't give it", "check the spelling"),
    ),
    "a directory that is no checkpoint": (("nothing", *FFN), ("no config.json", "save_pretrained")),
    "no recipe": (("SOURCE", "resipe.yaml"), ("resipe.yaml", "does not exist")),
    "a misspelt key": (("SOURCE", "recipe.yaml"), ("unknown key 'remov'", "'remove'")),
    "two goals": (
        ("SOURCE", *FFN, "--target", "params=0.7"),
        ("exactly one of remove, target, shape, plan", "remove and target"),
    ),
    "an unknown role": (("SOURCE", "--remove", "fnn=0.5"), ("unknown role", "did you mean 'ffn'?")),
    "all of it": (("SOURCE", "--remove", "ffn=1.5"), ("'1.5'", "fraction to remove")),
    "no budget": (("SOURCE", "--target", "params=0"), ("'0' is not a budget", "positive")),
    "an unknown score": (
        ("SOURCE", *FFN, "--score", "magnitud"),
        ("unknown score", "did you mean 'magnitude'?"),
    ),
    "an unknown format": (("SOURCE", *FFN, "--format", "onx"), ("did you mean 'onnx'?",)),
    "a checkpoint of ONNX": (
        ("model.onnx", *FFN, "--format", "hf"),
        ("an ONNX model can only be written as ONNX", "ask for format onnx"),
    ),
    "a pattern without a method": (
        ("SOURCE", "--pattern", "2:4", *FFN),
        ("--pattern", "add --sparsify"),
    ),
    "going on with a dry run": (
        ("SOURCE", *FFN, "--resume", "--dry-run"),
        ("a dry run has nothing to go on from", "--resume"),
    ),
    "no text": (("SOURCE", *FFN, "--text", "god.txt"), ("god.txt", "does not exist")),
    "no data": (("SOURCE", *FFN, "--data", "god.txt"), ("god.txt", "does not exist")),
    "an empty text": (("SOURCE", *FFN, "--text", "empty.txt"), ("is empty", "empty.txt")),
    "another encoding": (("SOURCE", *FFN, "--data", "latin.txt"), ("not UTF-8", "latin.txt")),
    "too short a text": (
        ("SOURCE", *FFN, "--data", "short.txt"),
        ("too short", "512 are needed", "a longer text"),
    ),
    "records without the field": (
        ("SOURCE", *FFN, "--data", "records.jsonl"),
        ("records.jsonl:1", "holds no text", "body"),
    ),
    "a pickle": (("SOURCE", *FFN, "--data", "weights.pt"), ("Python objects", ".safetensors")),
    "images": (("SOURCE", *FFN, "--data", "photos"), ("doesn't read images", "give a text")),
    "a directory without data": (
        ("SOURCE", *FFN, "--data", "nothing"),
        ("no calibration data", "give a file"),
    ),
    "data for nothing": (
        ("SOURCE", *FFN, "--data", "good.txt", "--score", "magnitude"),
        ("nothing reads calibration.data", "score magnitude looks at no data", "leave it out"),
    ),
    "no data for nothing": (
        ("SOURCE", *FFN, "--data", "god.npy", "--score", "magnitude"),
        ("nothing reads calibration.data", "leave it out"),
    ),
    "the plan of another model": (
        ("SOURCE", "--plan", "plan.json"),
        ("doesn't belong to this model", "2,560", "1,536", "make a new plan"),
    ),
    "no plan": (("SOURCE", "--plan", "plans.json"), ("plans.json", "can't read the plan")),
    "more than there is": (
        ("SOURCE", "--shape", "ffn=100000"),
        ("ffn 100000 is not reachable", "49,152", "graphprune inspect"),
    ),
    "weights beside a checkpoint": (
        ("SOURCE", *FFN, "--weights", "w.safetensors"),
        ("only the module of a factory", "holds its weights itself"),
    ),
    "an output that exists": (("SOURCE", *FFN, "-o", "full"), ("the output exists", "another")),
    "an output inside the source": (
        ("SOURCE", *FFN, "-o", "SOURCE/slim"),
        ("inside the source", "another output"),
    ),
    "an output inside a file": (("SOURCE", *FFN, "-o", "file/slim"), ("file", "another output")),
    "a repair of nothing": (
        ("SOURCE", "--sparsify", "magnitude", "--sparsity", "50%", "--repair", "bias"),
        ("'repair' is about structures", "removes none"),
    ),
}
_HEAVY = {"a repair of nothing"}
"""Those that look the options of a method up, which imports torch."""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_at_once(name: str, place: Path) -> None:
    arguments, messages = MISTAKES[name]
    source = model_path("smollm2")
    words = [word.replace("SOURCE", str(source)) for word in arguments]
    if "-o" not in words and "--dry-run" not in words:
        words += ["-o", "slim"]
    before, own = tree(place), tree(source)
    ended = told(place, ["compile", *words])
    check_failure(ended.result, *messages)
    assert "loading" not in ended.result.err
    if name not in _HEAVY:
        assert ended.imported == ""
        assert ended.seconds < SECONDS
    assert tree(place) == before
    assert tree(source) == own
