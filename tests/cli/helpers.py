"""What the command-line tests share: results, and how a failure has to look."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

LETTERS = [chr(code) for code in range(32, 127)]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def damaged(dense: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    copy = folder / "damaged"
    shutil.copytree(dense, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def check_failure(result: Result, *messages: str) -> None:
    """One message without a traceback, nothing on stdout."""
    assert result.code == 1
    assert result.out == ""
    for message in messages:
        assert message in result.err
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    assert "internal error" not in result.err


def compile_broken(
    run: Callable[..., Result], source: object, folder: Path, *flags: object
) -> Result:
    """Compile and check that nothing is left."""
    output = folder / "output" / "slim"
    flags = flags or ("--remove", "ffn=0.5")
    result = run("compile", source, "-o", output, *flags)
    assert not output.parent.exists() or tree(output.parent) == []
    return result


CYCLE = "".join(LETTERS[i] for i in (33, 40, 7, 90, 12, 61, 55, 3))


def teach(source: Path, path: Path, layers: int) -> Path:
    """A copy of a checkpoint that has learnt a text in which eight letters follow each other."""
    shutil.copytree(source, path)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.num_hidden_layers = layers
    del model.model.layers[layers:]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    cycle = torch.tensor([LETTERS.index(letter) for letter in CYCLE])
    ids = torch.stack([cycle.roll(-n).repeat(4) for n in range(8)])
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


def few_windows(path: Path, text: Path, steps: list[Any]) -> Path:
    """A recipe of some steps on a few short windows of a text alone."""
    data = {"data": str(text), "windows": 24, "length": 24, "general": 0.0}
    path.write_text(json.dumps({"calibration": data, "seed": 1, "steps": steps}))
    return path
