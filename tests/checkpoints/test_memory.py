"""Weights in mapped files leave memory, and are what they were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphprune.checkpoints.memory import page_out
from graphprune.checkpoints.weights import map_checkpoint


def resident(tensor):
    """Bytes in memory of the mapping that holds a tensor."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are read from /proc")
def test_mapped_weights_leave_memory(tmp_path):
    values = torch.randn(1 << 21)
    save_file({"w": values}, tmp_path / "model.safetensors")
    mapped = map_checkpoint(tmp_path)["w"]
    assert torch.equal(mapped, values)
    before = resident(mapped)
    assert before >= values.nbytes
    page_out(mapped)
    assert resident(mapped) < before / 4
    assert torch.equal(mapped, values)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are read from /proc")
def test_weights_that_are_mapped_twice_leave_memory(tmp_path):
    values = torch.randn(1 << 21)
    save_file({"w": values}, tmp_path / "model.safetensors")
    first, second = (map_checkpoint(tmp_path)["w"] for _ in range(2))
    assert torch.equal(first, second)
    before = resident(second)
    page_out(first)
    assert resident(first) < values.nbytes / 4
    assert resident(second) == before
    assert torch.equal(first, values)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are of Linux")
@pytest.mark.parametrize("place", [0, 12345, -1])
def test_mapped_weights_that_were_changed_keep_their_change(tmp_path, place):
    values = torch.randn(1 << 20)
    save_file({"w": values}, tmp_path / "model.safetensors")
    mapped = map_checkpoint(tmp_path)["w"]
    mapped[place] = 7.0
    page_out(mapped)
    values[place] = 7.0
    assert torch.equal(mapped, values)


def test_other_memory_keeps_its_contents():
    values = torch.randn(1 << 20)
    copy = values.clone()
    for view in (values, values[5:], values[::2], values[:3]):
        page_out(view)
    assert torch.equal(values, copy)
