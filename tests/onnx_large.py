"""ONNX files of any size with their weights beside them, and what a process needs in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

MIB = 1 << 20
_CHUNK = 1 << 22  # elements drawn and written at a time


class Peak(NamedTuple):
    """What a process held at most, in MiB.

    Attributes:
        anonymous: memory of its own, which the system can't take back (RssAnon and RssShmem).
        resident: that and the mapped pages of files (VmHWM), which it can.
        output: what the process printed.
    """

    anonymous: float
    resident: float
    output: str


def write_large(
    folder: Path, *, blocks: int, hidden: int, inner: int, words: int
) -> tuple[Path, int]:
    """A table of `words` rows, then residual blocks of two products, all in a second file.

    Weights are drawn and written piece by piece.

    Returns:
        The model's path, and the bytes of its weights.
    """
    shapes: dict[str, tuple[int, ...]] = {"table": (words, hidden)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["s0"])]
    for i in range(blocks):
        shapes |= {f"up{i}": (hidden, inner), f"bias{i}": (inner,), f"down{i}": (inner, hidden)}
        nodes += [
            helper.make_node("MatMul", [f"s{i}", f"up{i}"], [f"p{i}"]),
            helper.make_node("Add", [f"p{i}", f"bias{i}"], [f"h{i}"]),
            helper.make_node("Relu", [f"h{i}"], [f"a{i}"]),
            helper.make_node("MatMul", [f"a{i}", f"down{i}"], [f"d{i}"]),
            helper.make_node("Add", [f"s{i}", f"d{i}"], [f"s{i + 1}"]),
        ]
    shapes["head"] = (hidden, 8)
    nodes.append(helper.make_node("MatMul", [f"s{blocks}", "head"], ["y"]))
    tensors, offset = [], 0
    rng = np.random.default_rng(0)
    with (folder / "weights.bin").open("wb") as file:
        for name, shape in shapes.items():
            length = int(np.prod(shape))
            for start in range(0, length, _CHUNK):
                piece = rng.standard_normal(min(_CHUNK, length - start), dtype=np.float32)
                (piece / np.float32(2 * np.sqrt(shape[0] if len(shape) > 1 else 1))).tofile(file)
            tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "weights.bin", "offset": offset, "length": 4 * length}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            offset += 4 * length
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 8])
    graph = helper.make_graph(nodes, "large", [ids], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "large.onnx"
    onnx.save(model, path)
    return path, offset


def peak_of(command: Sequence[str]) -> Peak:
    """Run Python with a command's arguments and watch its memory.

    Raises:
        AssertionError: it fails; with what it printed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    private = resident = 0.0
    while process.poll() is None:
        now = _status(process.pid)
        private = max(private, now.get("RssAnon", 0) + now.get("RssShmem", 0))
        resident = max(resident, now.get("VmHWM", 0))
        time.sleep(0.002)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return Peak(private, resident, output)


def anonymous(process: int | str) -> float:
    """Memory of a process's own at this moment, in MiB."""
    now = _status(process)
    return now["RssAnon"] + now["RssShmem"]


def _status(process: int | str) -> dict[str, float]:
    """Lines of the process's status that count memory, in MiB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) / 1024 for name, _, value in pairs}
