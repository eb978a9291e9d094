"""Runs the Triton kernels for `bitmap` in Triton's interpreter, and prints what came out as JSON.

A program of its own: the interpreter is switched on for a whole process, before Triton is imported.
Each case gives its greatest error in units of what rounding allows.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from graphprune.kernels.formats import reference
from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.gpu import bitmap_triton

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
# Name, type, rows, columns, tokens, splits, share of zeros, activation.
CASES = [
    ("ragged", HALF, 5, 37, 3, 1, 0.5, "none"),
    ("one row", SINGLE, 1, 64, 1, 1, 0.5, "none"),
    ("one column", SINGLE, 17, 1, 8, 1, 0.0, "none"),
    ("bytes", HALF, 20, 72, 17, 2, 0.7, "none"),
    ("words", BRAIN, 33, 160, 8, 3, 0.6, "none"),
    ("full", HALF, 16, 128, 8, 2, 0.0, "none"),
    ("empty", SINGLE, 16, 70, 3, 2, 1.0, "none"),
    ("64 tokens", HALF, 18, 96, 64, 1, 0.5, "none"),
    ("65 tokens", SINGLE, 3, 40, 65, 1, 0.5, "none"),
    ("long", HALF, 17, 1000, 1, 5, 0.8, "none"),
    *((a, SINGLE, 20, 4, 16, 1, 0.0, a) for a in reference.ACTIVATIONS),
    ("half gelu", HALF, 9, 130, 3, 2, 0.5, "gelu"),
    ("brain silu", BRAIN, 9, 130, 3, 2, 0.5, "silu"),
]


def compute(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    splits: int = 1,
) -> torch.Tensor:
    packed = Bitmap.pack(weight)
    prepared = bitmap_triton.plan(packed.bitmask, splits)
    upcast = x.dtype == torch.bfloat16
    return bitmap_triton.bitmap_linear(x, packed, bias, activation, prepared, upcast)


def error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias, activation: str) -> float:
    """The greatest error, as a multiple of the rounding of the result and of float32 sums."""
    exact = reference.linear(x, Bitmap.pack(weight), bias, activation, torch.float64)
    terms = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.abs())
    allowed = exact.abs() * torch.finfo(y.dtype).eps + terms * 5e-7 + 1e-7
    return float(((y.double() - exact).abs() / allowed).max())


def main() -> None:
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    for name, dtype, rows, columns, tokens, splits, zeros, activation in CASES:
        weight = torch.randn(rows, columns).where(torch.rand(rows, columns) >= zeros, 0).to(dtype)
        if zeros and rows > 2:
            weight[rows // 2] = 0
        x = torch.randn(tokens, columns).to(dtype)
        bias = torch.randn(rows).to(dtype) if name != "ragged" else None
        y = compute(x, weight, bias, activation, splits)
        errors[name] = error(y, x, weight, bias, activation)
    exact: dict[str, bool] = {}
    single = torch.zeros(7, 100)
    single[4, 99] = 3.0
    x = torch.randint(-4, 5, (3, 100)).float()
    exact["one nonzero"] = torch.equal(compute(x, single, None, "none", 2), x @ single.T)
    # Whole numbers, so that sums are exact in any order.
    weight = torch.randint(-2, 3, (30, 300)).half()
    x = torch.randint(-2, 3, (9, 300)).half()
    dense = (x.float() @ weight.float().T).half()
    for splits in (1, 2, 5):
        exact[f"{splits} splits"] = torch.equal(compute(x, weight, None, "none", splits), dense)
    spread = torch.zeros(9, 700, dtype=torch.half)[:, ::2][:, :300]
    spread.copy_(x)
    exact["strided x"] = torch.equal(compute(spread, weight, None, "none"), dense)
    wide = torch.full((9, 340), float("nan"), dtype=torch.half)  # a NaN next to x isn't read
    wide[:, :300] = x
    exact["view of x"] = torch.equal(compute(wide[:, :300], weight, None, "none"), dense)
    bias = torch.arange(60).half()
    biased = (x.float() @ weight.float().T + bias[::2]).half()
    exact["strided bias"] = torch.equal(compute(x, weight, bias[::2], "none"), biased)
    exact["no tokens"] = compute(x[:0], weight, None, "none").shape == (0, 30)
    again = [compute(x * 0.1, weight, None, "gelu", 5) for _ in range(2)]
    exact["same again"] = torch.equal(*again)
    nan = compute(torch.full((1, 8), float("nan")), torch.ones(2, 8), None, "relu")
    exact["relu of NaN"] = bool(nan.isnan().all())
    print(json.dumps({"errors": errors, "exact": exact}))


if __name__ == "__main__":
    main()
