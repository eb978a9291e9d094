"""The Triton kernels for `bitmap`, in Triton's interpreter and on GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphprune.kernels.formats import reference
from graphprune.kernels.formats.bitmap import Bitmap

bitmap_triton = pytest.importorskip(
    "graphprune.kernels.gpu.bitmap_triton", reason="Triton can't be imported", exc_type=ImportError
)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float]]:
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of triton 3.6 can't loop with this NumPy")
    program = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_random_matrices(results):
    errors = results["errors"]
    assert len(errors) == 10 + len(reference.ACTIVATIONS) + 2
    assert {name: e for name, e in errors.items() if not e <= 1} == {}


def test_exact(results):
    assert results["exact"] == dict.fromkeys(
        [
            "one nonzero",
            "1 splits",
            "2 splits",
            "5 splits",
            "strided x",
            "view of x",
            "strided bias",
            "no tokens",
            "same again",
            "relu of NaN",
        ],
        True,
    )


@pytest.mark.parametrize("columns", [1, 37, 64, 72, 96, 128, 200, 1000])
def test_plan(columns: int):
    kept = torch.rand(6, columns) < 0.5
    packed = Bitmap.pack(kept.float())
    blocks = -(-columns // 64)
    for splits in range(1, blocks + 1):
        prepared = bitmap_triton.plan(packed.bitmask, splits)
        begins = [i * blocks // splits * 64 for i in range(splits)]
        expected = [[int(row[:begin].sum()) for begin in begins] for row in kept]
        assert prepared.before.tolist() == expected
        words = prepared.words[:, :, None] >> torch.arange(32) & 1
        assert torch.equal(words.flatten(1)[:, :columns].bool(), kept)
        assert prepared.words.shape == (6, 2 * blocks)
    for splits in (0, blocks + 1):
        with pytest.raises(ValueError, match="splits of"):
            bitmap_triton.plan(packed.bitmask, splits)


def test_plan_views_whole_rows():
    packed = Bitmap.pack(torch.ones(4, 128))
    assert bitmap_triton.plan(packed.bitmask).words.data_ptr() == packed.bitmask.data_ptr()


def test_operands_that_do_not_fit():
    packed = Bitmap.pack(torch.ones(4, 128))
    x = torch.ones(2, 128)
    for wrong, why in (
        ({"x": x[:, :100]}, r"shape \[2, 100\] instead of \[tokens, 128\]"),
        ({"x": x.half()}, "x is torch.float16, the weight torch.float32"),
        ({"bias": torch.ones(5)}, r"bias has the shape \[5\] instead of \[4\]"),
        ({"activation": "softplus"}, "'softplus' isn't one of none, relu"),
    ):
        with pytest.raises(ValueError, match=why):
            bitmap_triton.bitmap_linear(**{"x": x, "packed": packed, **wrong})
    other = bitmap_triton.plan(Bitmap.pack(torch.ones(4, 64)).bitmask)
    with pytest.raises(ValueError, match="isn't of this weight"):
        bitmap_triton.bitmap_linear(x, packed, prepared=other)
    double = Bitmap.pack(torch.ones(4, 128, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"torch\.float64 isn't one of"):
        bitmap_triton.bitmap_linear(x.double(), double)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "splits"), [(1, 37, 1), (300, 1000, 3), (512, 512, 8)])
def test_on_gpu(dtype: torch.dtype, rows: int, columns: int, splits: int):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).where(torch.rand(rows, columns) < 0.5, 0).to(dtype).cuda()
    bias = torch.randn(rows).to(dtype).cuda()
    packed = Bitmap.pack(weight)
    prepared = bitmap_triton.plan(packed.bitmask, splits)
    for tokens in (1, 8, 17, 64, 100):
        x = torch.randn(tokens, columns).to(dtype).cuda()
        y = bitmap_triton.bitmap_linear(x, packed, bias, "silu", prepared)
        exact = reference.linear(x, packed, bias, "silu", torch.float64)
        terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        allowed = exact.abs() * torch.finfo(dtype).eps + terms * 1e-5
        assert ((y.double() - exact).abs() <= allowed).all()
