"""A device without hardware, on which a forgotten ``.to`` fails.

Its tensors hold their numbers in memory, claim to be elsewhere, and refuse to meet tensors of the
processor. `strictly` is where it exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from graphprune.placement import Placement, on_device

_registration: Any = pytest.importorskip("torch.utils.backend_registration")
if not hasattr(_registration, "_DummyPrivateUse1Hook"):
    pytest.skip("this PyTorch takes no device from Python", allow_module_level=True)


class _Nowhere:
    """What torch wants to know of a kind of device: that no process should take one of these."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


class _Hook(_registration._DummyPrivateUse1Hook):  # type: ignore[misc]
    def is_available(self) -> bool:
        return False


_registration.rename_privateuse1_backend("strict")
# Now, since the engine of gradients counts devices when it is first used.
torch._register_device_module("strict", _Nowhere())
torch._C._acc.register_python_privateuseone_hook(_Hook())
torch._C._acc.register_python_privateuseone_device_guard(_registration._DummyDeviceGuard())

DEVICE = torch.device("strict", 0)

_BETWEEN = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""What may be told of two devices at a time."""


class MixedDevices(AssertionError):
    """Tensors of two devices have met."""


class Elsewhere(Tensor):
    """A tensor of the device.

    Attributes:
        inner: its numbers, in memory.
    """

    inner: Any

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"Elsewhere({self.inner!r})"

    def numpy(self, *, force=False):
        raise MixedDevices(f"NumPy reads main memory only, and {list(self.shape)} is elsewhere")

    def __array__(self, dtype=None):
        return self.numpy()

    def tolist(self):  # which torch has for real devices, and not for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatched(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What torch does of itself for devices that it knows.

    Attention gets the kernel that the processor has: where torch knows none, it takes another.
    Lists become tensors of the device.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ATTENTION and not torch.is_grad_enabled():
            return _dispatched(torch.ops.aten.scaled_dot_product_attention.default, args, kwargs)
        if func in (torch.tensor, torch.as_tensor) and _is_ours(kwargs.get("device")):
            here = {name: value for name, value in kwargs.items() if name != "device"}
            return func(*args, **here).to(DEVICE)
        if func in _INDEXING and isinstance(args[0], Elsewhere):
            args = (args[0], tree_map_only(list, _listed, args[1], is_leaf=_is_list), *args[2:])
        return func(*args, **kwargs)


_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def _listed(places: list[int]) -> Tensor:
    return torch.tensor(places).to(DEVICE)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_ours(device):
    return device is not None and torch.device(device).type == DEVICE.type


_ATTENTION = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


class _Device(TorchDispatchMode):
    """Makes tensors of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatched(func, args, kwargs or {})


def _dispatched(func, args, kwargs):
    """An operator, on the device that its operands are on or that it names."""
    ours, others = [], []
    for x in _tensors_in((*args, *kwargs.values())):
        (ours if isinstance(x, Elsewhere) else others).append(x)
    named = kwargs.get("device")
    away = bool(ours) if named is None else named.type == DEVICE.type
    if func not in _BETWEEN:
        _check(func, ours, [x for x in others if x.dim() or not ours])
        if (ours and not away) or (others and away and not ours):
            raise MixedDevices(f"{func} makes a tensor of another device than its operands'")
    if func is torch.ops.aten.copy_.default:
        away = isinstance(args[0], Elsewhere)
    here = {n: _bare(v) for n, v in kwargs.items()}
    if named is not None and away:
        here["device"] = torch.device("cpu")
    found = func(*map(_bare, args), **here)
    if not away:
        return args[0] if func is torch.ops.aten.copy_.default else found
    for x in _tensors_in([found]):
        if _largest and x.nbytes > _largest[-1]:
            raise torch.OutOfMemoryError(f"{func} makes {x.nbytes} bytes, of {_largest[-1]}")
    wrapped = _wrapped(found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if _shares(func) else wrapped


def _tensors_in(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _bare(value):
    if isinstance(value, Elsewhere):
        return value.inner
    return type(value)(map(_bare, value)) if type(value) in (list, tuple) else value


def _wrapped(value):
    if isinstance(value, Tensor):
        return value if isinstance(value, Elsewhere) else Elsewhere(value)
    return type(value)(map(_wrapped, value)) if type(value) in (list, tuple) else value


@cache
def _shares(func) -> bool:
    """Whether an operator gives back memory of an operand."""
    schema = func._schema
    return any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))


def _check(func, ours: list[Elsewhere], others: list[Tensor]) -> None:
    if ours and others:
        shapes = [list(x.shape) for x in others]
        raise MixedDevices(f"{func} reads {shapes} of the processor beside {DEVICE}")


_largest: list[int] = []


@contextmanager
def strictly(memory: int | None = None, largest: int | None = None) -> Iterator[Placement]:
    """Run what is inside on the device.

    Args:
        memory: see `graphprune.on_device`.
        largest: bytes of a tensor that it has room for.
    """
    _largest.extend(() if largest is None else (largest,))
    try:
        with _Calls(), _Device(), on_device(Placement(DEVICE, memory)) as placement:
            yield placement
    finally:
        _largest.clear()
