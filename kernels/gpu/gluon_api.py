"""The experimental interface of Triton that the strip kernel needs, or why it isn't there.

Gluon gives a kernel the shared memory and the layouts that Triton otherwise chooses itself. Its
interface is experimental, and differs between versions; nothing else imports it. From triton 3.6 on
it has what the kernel needs.

Attributes:
    AVAILABLE: whether the rest is there.
    REASON: why not; empty where it is.
    gluon, gl, mma_v2: the decorator, the language, and the tensor core instruction of sm_80.
    barrier: of the threads of a block.
    async_load, commit_group, wait_group: copies from global to shared memory, of sm_80.
    reinterpret: another view of shared memory, (memory, dtype, shape, layout), for kernels.
    VIEWS_OF_A_PART: whether a view may be smaller than its memory.
    GluonASTSource: for compilation ahead of time.
"""

from __future__ import annotations

from typing import Any

AVAILABLE = False
REASON = ""
VIEWS_OF_A_PART = True
gluon: Any = None
gl: Any = None
mma_v2: Any = None
barrier: Any = None
async_load: Any = None
commit_group: Any = None
wait_group: Any = None
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

    _copy = _ampere.async_copy
    _renamed = {
        "barrier": getattr(_language, "barrier", None) or _language.thread_barrier,
        "load": getattr(_copy, "async_load", None) or _copy.async_copy_global_to_shared,
    }
except ImportError as e:
    REASON = f"Gluon can't be imported: {e}; install triton >= 3.6"
except AttributeError as e:
    REASON = f"Gluon of triton {triton.__version__} is too old: {e}; install triton >= 3.6"
else:
    AVAILABLE = True
    gluon, gl, mma_v2 = _gluon, _language, _ampere.mma_v2
    barrier, async_load = _renamed["barrier"], _renamed["load"]
    commit_group, wait_group = _copy.commit_group, _copy.wait_group
    _memory = _language.shared_memory_descriptor
    reinterpret = gluon.jit(_view if hasattr(_memory, "reinterpret") else _view_until_3_8)
    VIEWS_OF_A_PART = not triton.__version__.startswith("3.8.")
    GluonASTSource = _runtime.GluonASTSource
