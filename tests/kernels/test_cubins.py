"""The kernels compile for GPUs that aren't there, and need no more than these have."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton can't be imported", exc_type=ImportError)

from graphprune.kernels.gpu import bitmap_triton, cubin, gluon_api
from kernels.builds import shared_bytes, strip

ARCHITECTURES = [80, 90, 100]
strips = pytest.mark.skipif(not gluon_api.AVAILABLE, reason=gluon_api.REASON)


def check(built: cubin.Cubin, registers: int = 255) -> None:
    assert built.code.startswith(b"\x7fELF")
    assert built.stack == 0
    assert built.spills == 0
    assert 0 < built.registers <= registers
    assert 0 < built.shared <= cubin.SHARED_LIMIT[built.architecture]
    assert built.mma > 0


@strips
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("tokens", "most"), [(8, 2.4), (16, 2.4), (32, 3.1), (64, 3.605)])
def test_strip_instructions(architecture: int, dtype: str, tokens: int, most: float):
    each = {}
    for slots in (128, 96, 64):
        built = strip(architecture, dtype, tokens, slots)
        # so that four blocks fit a multiprocessor, of 64 tokens three
        check(built, registers=168 if tokens == 64 else 128)
        assert built.mma == 2 * tokens  # 16 columns of 8 tokens each
        assert built.barriers == 3  # read, filled, scattered
        assert built.shared == shared_bytes(tokens)
        each[slots] = built.per_weight(64 * 256)
    assert 1 < each[128] <= most
    assert each[64] < each[96] < each[128]


@strips
@pytest.mark.parametrize(
    ("architecture", "dtype", "tokens", "slots"),
    [
        (80, "bf16", 16, 112),
        (80, "fp16", 64, 256),
        (90, "bf16", 64, 256),
        (90, "fp16", 32, 16),
        (100, "bf16", 64, 240),
    ],
)
def test_strip_configurations(architecture: int, dtype: str, tokens: int, slots: int):
    built = strip(architecture, dtype, tokens, slots)
    check(built)
    assert built.mma == 16 * tokens // 8
    assert built.shared == shared_bytes(tokens)


@pytest.mark.parametrize(
    ("architecture", "dtype", "tokens"),
    [
        *((a, "bf16", 16) for a in ARCHITECTURES),
        (80, "fp16", 64),
        (90, "fp16", 64),
        (100, "fp16", 32),  # for 64, triton 3.7 takes Blackwell's own MMA and 8 bytes of stack
    ],
)
def test_bitmap(architecture: int, dtype: str, tokens: int):
    pointers = {
        "x_ptr": f"*{dtype}",
        "words_ptr": "*i32",
        "offsets_ptr": "*i64",
        "before_ptr": "*i32",
        "values_ptr": f"*{dtype}",
        "partials_ptr": "*fp32",
    }
    numbers = dict.fromkeys(["M", "N", "K", "stride"], "i32")
    constants = {
        "TOKENS": tokens,
        "ROWS": bitmap_triton.BLOCK_ROWS,
        "COLUMNS": bitmap_triton.BLOCK_COLUMNS,
        "UPCAST": False,
    }
    aligned = {*pointers, "N", "K", "stride"}
    kernel = bitmap_triton.bitmap_kernel
    check(cubin.build(kernel, pointers | numbers, constants, architecture, aligned))


def test_reduction_has_no_float_atomics_or_spills():
    types = {"partials_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= dict.fromkeys(["M", "N", "splits"], "i32")
    constants = {"BIAS": True, "ACTIVATION": "gelu", "ROWS": 256}
    built = cubin.build(bitmap_triton.reduce_kernel, types, constants, 90)
    assert (built.stack, built.spills, built.shared) == (0, 0, 0)
    assert built.loop["FADD"] > 0
    assert not {"ATOM", "ATOMG", "RED"} & set(built.loop)


def test_numbers_that_are_one():
    """Triton makes constants of them where it launches a kernel."""
    types = {"partials_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32"}
    constants = {"BIAS": True, "ACTIVATION": "silu", "ROWS": 256, "N": 1, "splits": 1}
    assert cubin.build(bitmap_triton.reduce_kernel, types, constants, 90).spills == 0
    types = dict.fromkeys(["x_ptr", "values_ptr"], "*fp16")
    types |= {"words_ptr": "*i32", "offsets_ptr": "*i64", "before_ptr": "*i32"}
    types |= {"partials_ptr": "*fp32", "M": "i32"}
    constants = dict.fromkeys(["N", "K", "stride"], 1)
    constants |= {"TOKENS": 16, "ROWS": 16, "COLUMNS": 64, "UPCAST": False}
    assert cubin.build(bitmap_triton.bitmap_kernel, types, constants, 90).spills == 0


@strips
def test_strip_numbers_that_are_one():
    from graphprune.kernels.gpu.strip_gluon import strip_kernel

    types = {"x_ptr": "*fp16", "values_ptr": "*i32", "places_ptr": "*i32"}
    types |= {"partials_ptr": "*fp32", "M": "i32", "stride": "i32"}
    constants = dict.fromkeys(["N", "K", "across", "splits"], 1) | {"TOKENS": 8, "CHUNKS": 1}
    built = cubin.build(strip_kernel, types, constants, 90, {"x_ptr", "stride"})
    assert built.spills == 0


def test_arguments_are_checked():
    with pytest.raises(cubin.CubinError, match=r"reduce_kernel: arguments .*'N'.* are missing"):
        cubin.build(bitmap_triton.reduce_kernel, {}, {}, 90)


def test_what_does_not_compile_is_named():
    types = {"partials_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*fp32"}
    types |= dict.fromkeys(["M", "N", "splits"], "i32")
    constants = {"BIAS": False, "ACTIVATION": "none", "ROWS": 100}
    with pytest.raises(cubin.CubinError, match=r"reduce_kernel doesn't compile for sm_90"):
        cubin.build(bitmap_triton.reduce_kernel, types, constants, 90)
