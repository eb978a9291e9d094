"""The experimental interface of Triton that the strip kernel needs, or why it isn't there.

Gluon gives a kernel the shared memory and the layouts that Triton otherwise chooses itself. Its
interface is experimental, and differs between versions; nothing else imports it. Triton 3.7 is the
first whose shared memory has `scatter`, without which the kernel can't be written.

Attributes:
    AVAILABLE: whether the rest is there.
    REASON: why not; empty where it is.
    gluon, gl, mma_v2: the decorator, the language, and the tensor core instruction of sm_80.
    reinterpret: another view of shared memory, (memory, dtype, shape, layout), for kernels.
    GluonASTSource: for compilation ahead of time.
"""

from __future__ import annotations

from typing import Any

AVAILABLE = False
REASON = ""
gluon: Any = None
gl: Any = None
mma_v2: Any = None
reinterpret: Any = None
GluonASTSource: Any = None


# Triton reads annotations as code, so these have none but constexpr.
def _view(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return memory.reinterpret(dtype, shape, layout)


def _view_until_3_8(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return memory._reinterpret(dtype, shape, layout)


try:
    import triton
    from triton.experimental import gluon as _gluon
    from triton.experimental.gluon import _runtime
    from triton.experimental.gluon import language as _language
    from triton.experimental.gluon.language.nvidia import ampere as _ampere
except ImportError as e:
    REASON = f"Gluon can't be imported: {e}; install triton >= 3.7"
else:
    _memory = _language.shared_memory_descriptor
    if hasattr(_memory, "scatter"):
        AVAILABLE = True
        gluon, gl, mma_v2 = _gluon, _language, _ampere.mma_v2
        reinterpret = gluon.jit(_view if hasattr(_memory, "reinterpret") else _view_until_3_8)
        GluonASTSource = _runtime.GluonASTSource
    else:
        REASON = (
            f"Gluon of triton {triton.__version__} has no scatter to shared memory; "
            "install triton >= 3.7"
        )
