"""The strip kernel, compiled ahead of time."""

from __future__ import annotations

from graphprune.kernels.gpu import cubin


def shared_bytes(tokens: int) -> int:
    from graphprune.kernels.gpu import strip_gluon

    return strip_gluon.shared_bytes(tokens)


def strip(
    architecture: int, dtype: str, tokens: int, slots: int, aligned: bool = True
) -> cubin.Cubin:
    """Compile it; `aligned` is what Triton makes of rows and columns that are multiples of 16."""
    from graphprune.kernels.gpu.strip_gluon import strip_kernel

    pointers = {
        "x_ptr": f"*{dtype}",
        "values_ptr": "*i32",
        "places_ptr": "*i32",
        "partials_ptr": "*fp32",
    }
    numbers = dict.fromkeys(["M", "N", "K", "stride", "across", "splits"], "i32")
    multiples = {*pointers, "stride", *(("N", "K") if aligned else ())}
    constants = {"TOKENS": tokens, "CHUNKS": slots // 16}
    return cubin.build(strip_kernel, pointers | numbers, constants, architecture, multiples)
