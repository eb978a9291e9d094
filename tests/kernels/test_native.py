"""The kernel in C++: every variant against float64, and what it refuses."""

import multiprocessing
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphprune.kernels import native
from graphprune.kernels.formats.bitmap import Bitmap
from kernels.native_build import ROOT, build, extension, library

__all__ = ["library"]

VARIANTS = ("avx512_bf16", "avx512", "avx2", "portable")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
many = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=VARIANTS)
def variant(library, request):
    try:
        native.force_variant(request.param)
    except native.NativeError:
        pytest.skip(f"this processor doesn't have {request.param}")
    assert native.variant() == request.param
    yield request.param
    native.force_variant(None)


def weight(rows, columns, density, dtype=torch.float32, seed=0):
    """Random numbers, of which some are zero; "one" stands for a single number."""
    draw = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=draw)
    if density == "one":
        place = torch.randint(rows * columns, (1,), generator=draw)
        kept = torch.zeros(rows * columns, dtype=torch.bool).index_fill_(0, place, True)
        dense = dense * kept.view(rows, columns)
    else:
        dense = dense * (torch.rand(rows, columns, generator=draw) < density)
    return dense.to(dtype)


def tokens(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(y, x, dense, bias=None):
    """Compare with float64; the bound is that of rounding sums of absolute values."""
    exact = x.double() @ dense.double().T
    size = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[y.dtype]
    bound = 1e-5 * size + rounding * exact.abs() + (2.0**-24 if y.dtype == torch.float16 else 0.0)
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


shapes = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20))
densities = st.sampled_from([0.0, "one", 0.05, 0.3, 0.5, 1.0])


@many
@given(shapes, densities, st.sampled_from(TYPES), st.booleans(), st.integers(0, 9))
def test_every_variant_is_right(variant, shape, density, dtype, biased, seed):
    rows, columns, count = shape
    dense = weight(rows, columns, density, dtype, seed)
    x = tokens(count, columns, dtype=dtype)
    bias = tokens(rows, dtype=dtype) if biased else None
    packed = Bitmap.pack(dense)
    native.verify(packed)
    check(native.bitmap_linear(x, packed, bias, threads=1), x, dense, bias)


@many
@given(shapes, st.sampled_from(TYPES), st.sampled_from(TYPES))
def test_types_may_differ(variant, shape, inputs, values):
    rows, columns, count = shape
    dense = weight(rows, columns, 0.4, values)
    x = tokens(count, columns, dtype=inputs)
    check(native.bitmap_linear(x, Bitmap.pack(dense)), x, dense)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 9, 33])
def test_threads_change_nothing(variant, dtype, count):
    dense = weight(1023, 777, 0.5, dtype)
    dense[:500] *= weight(500, 777, 0.01, dtype) != 0  # unevenly spread
    packed, x = Bitmap.pack(dense), tokens(count, 777, dtype=dtype)
    one = native.bitmap_linear(x, packed, threads=1)
    for threads in (2, 3, 7, 1000):
        assert torch.equal(native.bitmap_linear(x, packed, threads=threads), one)


def test_leading_dimensions_and_strides(library):
    dense = weight(40, 70, 0.5)
    packed, x = Bitmap.pack(dense), tokens(70, 3, 2).permute(2, 1, 0)
    y = native.bitmap_linear(x, packed)
    assert y.shape == (2, 3, 40)
    torch.testing.assert_close(y, x @ dense.T)
    assert native.bitmap_linear(x[0, 0], packed).shape == (40,)
    assert native.bitmap_linear(x[:0], packed).shape == (0, 3, 40)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_nothing_behind_the_parts_is_read(library, variant):
    """In a process of its own, which a read of the page behind them would end."""
    script = ROOT / "tests" / "kernels" / "guarded.py"
    command = [sys.executable, str(script), str(library), variant]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_half_precision_is_rounded_like_torch(variant):
    """A weight of one column of ones copies x through every conversion there is."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        if dtype == torch.bfloat16:  # vdpbf16ps takes subnormal numbers for zero
            every = every[(every == 0) | (every.abs() >= torch.finfo(dtype).tiny)]
        one = Bitmap.pack(torch.ones(1, 1, dtype=dtype))
        y = native.bitmap_linear(every[:, None], one)[:, 0]
        assert torch.equal(y, every)
        sums = native.bitmap_linear(every[:, None], one, tokens(1, dtype=dtype))[:, 0]
        expected = (every.float() + tokens(1, dtype=dtype).float()).to(dtype)
        assert torch.equal(sums, expected)


def test_wrong_arguments_are_refused(library):
    packed, x = Bitmap.pack(weight(6, 20, 0.5)), tokens(2, 20)
    linear = native.bitmap_linear
    with pytest.raises(ValueError, match=r"x is \[2, 19\], but the weight has 20 columns"):
        linear(x[:, :19], packed)
    with pytest.raises(ValueError, match="20 columns"):
        linear(torch.tensor(1.0), packed)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        linear(x.double(), packed)
    with pytest.raises(TypeError, match="on the cpu, not meta"):
        linear(x.to("meta"), packed)
    with pytest.raises(ValueError, match=r"bias is \[5\]"):
        linear(x, packed, tokens(5))
    with pytest.raises(TypeError, match=r"bias is torch\.bfloat16, not torch\.float32"):
        linear(x, packed, tokens(6).bfloat16())
    with pytest.raises(ValueError, match="0 threads"):
        linear(x, packed, threads=0)


@pytest.mark.parametrize(
    ("field", "change", "error", "match"),
    [
        ("values", lambda t: t.double(), TypeError, "values is torch.float64"),
        ("values", lambda t: t.view(-1, 1), ValueError, "values is"),
        ("values", lambda t: t[:-1], ValueError, "row_offsets|bits"),
        ("values", lambda t: t.repeat_interleave(2)[::2], ValueError, "values isn't contiguous"),
        ("bitmask", lambda t: t.char(), TypeError, "bitmask is torch.int8"),
        ("bitmask", lambda t: t[:, :-1], ValueError, r"bitmask is \[6, 2\] instead of \[6, 3\]"),
        ("bitmask", lambda t: t.flip(0), ValueError, r"bits of a row .* \(row 0\)"),
        ("bitmask", lambda t: t | 128, ValueError, r"\(row 0\)"),
        ("row_offsets", lambda t: t.int(), TypeError, "row_offsets is torch.int32"),
        ("row_offsets", lambda t: t[1:], ValueError, r"row_offsets is \[5\] instead of \[6\]"),
        ("row_offsets", lambda t: t + 1, ValueError, r"row_offsets .* \(row 0\)"),
        ("row_offsets", lambda t: t.flip(0), ValueError, r"row_offsets .* \(row 0\)"),
        ("row_offsets", lambda t: t * 2**40, ValueError, r"row_offsets .* \(row 0\)"),
    ],
)
def test_bad_weights_are_found(library, field, change, error, match):
    dense = weight(6, 20, 0.5)
    dense[0], dense[5] = 1, 0
    parts = vars(Bitmap.pack(dense)).copy()
    bad = Bitmap(**{**parts, field: change(parts[field])})
    with pytest.raises(error, match=match):
        native.verify(bad)
    if field == "row_offsets":  # these are always checked
        with pytest.raises(error, match=match.split(r" \(")[0]):
            native.bitmap_linear(tokens(2, 20), bad)


def test_callers_on_several_threads(library):
    dense = weight(2048, 512, 0.5)
    packed, x = Bitmap.pack(dense), tokens(3, 512)
    expected, wrong = native.bitmap_linear(x, packed, threads=1), []

    def work():
        for _ in range(50):
            if not torch.equal(native.bitmap_linear(x, packed, threads=3), expected):
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(library):
    packed, x = Bitmap.pack(weight(2048, 512, 0.5)), tokens(1, 512)
    expected = native.bitmap_linear(x, packed, threads=2)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()

    def work():
        answer.put(native.bitmap_linear(x, packed, threads=2).tolist())

    child = context.Process(target=work)
    child.start()
    assert answer.get(timeout=60) == expected.tolist()
    child.join(60)
    assert child.exitcode == 0


def test_the_library_was_built(library):
    """Wherever there is a compiler, the sources are what these tests have run."""
    if shutil.which("g++"):
        assert library == build()
    assert native.available()
    assert native.variant() in VARIANTS


def test_all_sources_are_named():
    folder = ROOT / "kernels" / "native"
    found = {str(file.relative_to(ROOT)) for file in folder.glob("*.cpp")}
    headers = {str(file.relative_to(ROOT)) for file in folder.glob("*.h")}
    assert set(extension()["sources"]) == found
    assert set(extension()["depends"]) == headers


def test_other_files_are_no_library(tmp_path):
    (tmp_path / "_native.so").write_text("nonsense")
    with pytest.raises(OSError, match="_native"):
        native.load(tmp_path / "_native.so")


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(native, "find_library", lambda: (None, None, "none was built"))
    assert not native.available()
    assert native.path() is None
    with pytest.raises(native.NativeError, match="none was built"):
        native.variant()


def test_old_libraries_are_refused(library, monkeypatch):
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    with pytest.raises(OSError, match="version 1 instead of 2"):
        native.load(library)


def test_the_program_ends_with_threads_waiting(library):
    """Threads that wait for work don't keep a process, nor crash it."""
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from graphprune.kernels import native\n"
        "from graphprune.kernels.formats.bitmap import Bitmap\n"
        f"made = Path({str(library)!r})\n"
        "native.find_library = lambda found=(made, native.load(made), ''): found\n"
        "packed = Bitmap.pack(torch.ones(1024, 512))\n"
        "print(native.bitmap_linear(torch.ones(1, 512), packed, threads=4).sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 1024 * 512
