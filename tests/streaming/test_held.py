"""Activations that wait in files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import graphprune as gp
import graphprune.checkpoints.memory as module
from graphprune.errors import CalibrationError
from graphprune.frontends.onnx.load import load_onnx
from graphprune.passes.masks.oneshot import sparsify
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.solvers import Unstructured
from graphprune.streaming import Held
from streaming.oracle import tokens, traced
from zoo import decoders

HALF = Unstructured(0.5)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each file that is made."""
    found: list[int] = []
    reserve = module.reserve

    def counting(file: int, size: int) -> None:
        reserve(file, size)
        assert os.fstat(file).st_size == size
        found.append(size)

    monkeypatch.setattr(module, "reserve", counting)
    monkeypatch.setattr(module, "SMALL", 1)
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "along"])
def test_nothing_else_changes(
    counted: list[int], tmp_path: Path, dtype: torch.dtype | None, reference: bool
) -> None:
    program, _ = traced(decoders.llama_gqa_4)
    wanted = sparsify(program, tokens(), SparseGPT(), HALF, held=dtype, reference=reference)
    assert not counted
    held = Held(dtype, tmp_path)
    found = sparsify(program, tokens(), SparseGPT(), HALF, held=held, reference=reference)
    stream = tokens()[:1].numel() * 32 * (2 if dtype else 4)
    assert stream in counted  # the residual stream of a sample
    for e in wanted.layers:
        new = found.program.weights[e.parameter]
        assert torch.equal(new, wanted.program.weights[e.parameter])
    assert list(tmp_path.iterdir()) == []


def test_onnx_models_too(counted: list[int], tmp_path: Path) -> None:
    program, _ = traced(decoders.llama_gqa_4)
    path = tmp_path / "dense.onnx"
    gp.apply(program, gp.Plan(program.fingerprint, {})).save(path, format="onnx")
    model, folder = load_onnx(path), tmp_path / "waiting"
    folder.mkdir()
    wanted = sparsify(model, tokens(), SparseGPT(), HALF)
    assert not counted
    found = sparsify(model, tokens(), SparseGPT(), HALF, held=Held(folder=folder))
    assert counted
    for e in wanted.layers:
        new = found.program.weights[e.parameter]
        assert torch.equal(new, wanted.program.weights[e.parameter])
    assert list(folder.iterdir()) == []


def test_small_ones_stay_in_memory(tmp_path: Path) -> None:
    small, large = torch.ones(module.SMALL // 4 - 1), torch.ones(module.SMALL // 4)
    held = Held(folder=tmp_path)
    assert held.away(small) is small
    copy = held.away(large)
    assert copy.data_ptr() != large.data_ptr()
    assert torch.equal(copy, large)
    copy[0] = 5  # what is computed with it may be written to
    assert copy.sum() == large.sum() + 4


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(module, "SMALL", 1)
    program, _ = traced(decoders.llama_gqa_4)
    with pytest.raises(CalibrationError, match="can't wait in a file") as caught:
        sparsify(program, tokens(), SparseGPT(), HALF, held=Held(folder=tmp_path))
    assert caught.value.where == str(tmp_path)
    assert "No space left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", ["uniform", "sensitivity"])
def test_recipes_ask_for_it(counted: list[int], tmp_path: Path, budget: str) -> None:
    torch.manual_seed(0)
    dense, x = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))), torch.randn(40, 8)
    data = tmp_path / "data.npy"
    np.save(data, x.numpy())
    states = []
    for offload in (False, True):
        recipe = {
            "sparsify": {
                "method": "sparsegpt",
                "sparsity": 0.5,
                "budget": budget,
                "offload": offload,
            },
            "calibration": {"data": str(data), "windows": 40, "draw": "first"},
        }
        out = tmp_path / f"{offload}.pt2"
        gp.compile(dense.eval(), recipe, out, example=(x[:2],))
        states.append(torch.export.load(out).state_dict)
        assert bool(counted) is offload
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name])
