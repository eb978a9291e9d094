"""The part ``gpu`` of tools/bench kernels: sparse products against cuBLAS and the byte floor.

Every time is that of a CUDA graph of calls that go round copies of their weight, more than the
second-level cache holds. The floor is what the bytes of the packed weight take at the bandwidth
that a copy on the same card reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphprune.kernels.formats.files import FORMATS
from graphprune.kernels.formats.packed import FormatError, nbytes
from graphprune.kernels.operators import linear

SHAPES = {
    "Llama-7B qkv": (12288, 4096),
    "Llama-7B o": (4096, 4096),
    "Llama-7B ffn1": (22016, 4096),
    "Llama-7B ffn2": (4096, 11008),
    "Llama-13B qkv": (15360, 5120),
    "Llama-13B o": (5120, 5120),
    "Llama-13B ffn1": (27648, 5120),
    "Llama-13B ffn2": (5120, 13824),
    "OPT-30B qkv": (21504, 7168),
    "OPT-30B o": (7168, 7168),
    "OPT-30B ffn1": (28672, 7168),
    "OPT-30B ffn2": (7168, 28672),
    "OPT-66B qkv": (27648, 9216),
    "OPT-66B o": (9216, 9216),
    "OPT-66B ffn1": (36864, 9216),
    "OPT-66B ffn2": (9216, 36864),
}
TOKENS = (1, 8, 16, 32, 64)
SPARSITIES = (0.5, 0.625, 0.75, 0.875)
BARS = {0.5: 1.2, 0.625: 1.5, 0.75: 2.0}  # cuBLAS' time over ours, on an H100, up to 16 tokens
_CACHE = 256 << 20  # bytes of weights that calls go round
_TURNS = 20


def rows() -> list[dict[str, Any]]:
    """Measure every shape; a format whose result is wrong isn't timed but raises."""
    speed = _bandwidth()
    found = []
    hopper = "H100" in torch.cuda.get_device_name()
    for name, (outputs, inputs) in SHAPES.items():
        for sparsity in SPARSITIES:
            weight = balanced(outputs, inputs, sparsity)
            packed = {}
            for format in ("strip_u8", "bitmap"):
                packed[format] = FORMATS[format].pack(weight)
            for tokens in TOKENS:
                x = torch.randn(tokens, inputs, dtype=weight.dtype, device="cuda")
                dense = _time([_dense(x, w) for w in _copies(weight)])
                row: dict[str, Any] = {"layer": name, "sparsity": sparsity, "tokens": tokens,
                                       "dense_us": dense * 1e6}  # fmt: skip
                for format, one in packed.items():
                    _check(x, weight, linear(x, one), f"{format}, {name}, {tokens} tokens")
                    seconds = _time([_sparse(x, p) for p in _packed_copies(one)])
                    row[f"{format}_us"] = seconds * 1e6
                    row[f"{format}_floor_us"] = nbytes(one) / speed * 1e6
                if sparsity == 0.5 and (seconds24 := _semi_structured(x, outputs, inputs)):
                    row["2:4_us"] = seconds24 * 1e6
                row["ratio"] = dense * 1e6 / row["strip_u8_us"]
                if hopper and sparsity in BARS and tokens <= 16:
                    row["bar"] = BARS[sparsity]
                found.append(row)
            del packed, weight
            torch.cuda.empty_cache()
    return found


def balanced(outputs: int, inputs: int, sparsity: float) -> torch.Tensor:
    """A weight with equal counts in every 256 columns, bfloat16, on the GPU."""
    weight = torch.randn(outputs, inputs, device="cuda").unflatten(1, (-1, 256))
    kept = weight.abs().topk(round((1 - sparsity) * 256), dim=2).indices
    found = torch.zeros_like(weight).scatter_(2, kept, weight.gather(2, kept))
    return found.flatten(1).to(torch.bfloat16)


def _check(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, what: str) -> None:
    expected = x.double() @ weight.double().T
    error = float((y.double() - expected).norm() / expected.norm())
    if not error < 5e-3:
        raise AssertionError(f"{what}: relative error {error:.2e}")


def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
    count = max(2, -(-_CACHE // (weight.numel() * weight.element_size())))
    return [weight.clone() for _ in range(count)]


def _packed_copies(packed: Any) -> list[Any]:
    kind = type(packed)
    count = max(2, -(-_CACHE // nbytes(packed)))
    return [
        kind.of_tensors(packed.shape, {n: t.clone() for n, t in packed.tensors().items()})
        for _ in range(count)
    ]


def _dense(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.nn.functional.linear(x, weight)


def _sparse(x: torch.Tensor, packed: Any) -> Callable[[], torch.Tensor]:
    return lambda: linear(x, packed)


def _semi_structured(x: torch.Tensor, outputs: int, inputs: int) -> float | None:
    """Seconds of torch's 2:4 product; None where it doesn't take the shape."""
    weight = torch.randn(outputs, inputs, device="cuda", dtype=x.dtype).unflatten(1, (-1, 4))
    weight[..., 2:] = 0
    try:
        packed = torch.sparse.to_sparse_semi_structured(weight.flatten(1))
        return _time([_dense(x, packed)])
    except (RuntimeError, NotImplementedError, FormatError):
        return None


def _time(calls: Sequence[Callable[[], torch.Tensor]]) -> float:
    """Seconds of one call in a CUDA graph of all of them, the median of several replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for turn in range(_TURNS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return sorted(times)[len(times) // 2]


def _bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _time([lambda: target.copy_(source)])
