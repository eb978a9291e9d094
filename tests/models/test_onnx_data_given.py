"""What data is worth to a real ONNX classifier: Magika tells kinds of files by their bytes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import graphprune
from models.cache import model_path

HALF, PADDING = 1024, 256
EACH = 16
"""Files of each kind; half of them are calibrated on, the other half judged."""


def read(path: Path) -> list[int]:
    """What Magika reads of a file: its first bytes and its last ones."""
    raw = path.read_bytes().strip()
    first, last = list(raw[:HALF]), list(raw[-HALF:])
    return first + [PADDING] * (2 * HALF - len(first) - len(last)) + last


def files() -> tuple[list[Path], list[Path]]:
    kinds: dict[str, list[Path]] = defaultdict(list)
    for folder in (Path(torch.__file__).parent, Path(np.__file__).parent):
        for path in sorted(folder.rglob("*")):
            few = len(kinds[path.suffix]) < EACH
            if few and path.is_file() and path.stat().st_size > 200:
                kinds[path.suffix].append(path)
    whole = [found for found in kinds.values() if len(found) == EACH]
    return [p for f in whole for p in f[: EACH // 2]], [p for f in whole for p in f[EACH // 2 :]]


@pytest.mark.slow  # a real model, twice
def test_with_data_a_classifier_keeps_more_of_what_it_knows(tmp_path: Path) -> None:
    source = model_path("magika") / "model.onnx"
    seen, held_out = files()
    assert len(held_out) >= 64
    given = np.array([read(path) for path in held_out], np.int32)

    def answers(path: Path) -> Any:
        session = onnxruntime.InferenceSession(str(path))
        return np.concatenate([session.run(None, {"bytes": part})[0] for part in
                               np.array_split(given, len(given) // 16)])  # fmt: skip

    np.save(tmp_path / "bytes.npy", np.array([read(path) for path in seen], np.int32))
    dense, same = answers(source).argmax(1), {}
    for score, calibration in (("magnitude", {}), ("obs", {"data": str(tmp_path / "bytes.npy")})):
        recipe = {"remove": {"ffn": 0.25}, "calibration": calibration}
        report = graphprune.compile(source, recipe, tmp_path / score)
        assert report.score == score
        same[score] = float((answers(tmp_path / score / "model.onnx").argmax(1) == dense).mean())
    assert same["obs"] > same["magnitude"] + 0.2
