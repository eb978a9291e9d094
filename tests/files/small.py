"""A small ONNX model, and what happens while it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

TEXT = "g (float[N,20] x) => (float[N,3] y) { h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }"
RECIPE = {"remove": {"*": 0.5}}
X = np.ones((2, 20), np.float32)


def at(stage: str, act: Callable[[], object]) -> Callable[[str], None]:
    """A progress callback that does something when a stage begins."""

    def told(name: str) -> None:
        if name.startswith(stage):
            act()

    return told


def run(file: Path) -> Any:
    return onnxruntime.InferenceSession(file).run(None, {"x": X})[0]
