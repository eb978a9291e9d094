"""A linear layer whose weight is packed."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from . import native
from .formats.bitmap import Bitmap
from .formats.files import FORMATS
from .formats.nm24 import NM24
from .formats.packed import FormatError, Packed
from .formats.reference import ACTIVATIONS, check_activation
from .operators import check_columns, linear


class SparseLinear(nn.Module):
    """``act(x W^T + b)`` with a packed W, for inference.

    Its state dict has the parts of the weight under their own names, ``weight.bitmask`` for
    instance being ``bitmask`` here, and `bias`.

    Attributes:
        in_features: columns of the weight.
        out_features: its rows.
        format: the name of its format.
        activation: what is done with the outputs.
    """

    bias: Tensor | None

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, activation: str = "none"
    ) -> None:
        """Make a layer of a packed weight.

        Args:
            packed: [out_features, in_features].
            bias: [out_features].
            activation: a name in `reference.ACTIVATIONS`.

        Raises:
            ValueError: There is no such activation, or the bias has another size.
        """
        super().__init__()
        if bias is not None and bias.shape != (packed.shape[0],):
            raise ValueError(f"the bias has the shape {list(bias.shape)}, not [{packed.shape[0]}]")
        check_activation(activation)
        self.out_features, self.in_features = packed.shape
        self.format = packed.format
        self.activation = activation
        self._parts = tuple(packed.tensors())
        self._kernel: tuple[tuple[tuple[int, int], ...], native.Prepared | None] = (), None
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def of_linear(cls, layer: nn.Linear, format: str, activation: str = "none") -> Self:
        """Pack the weight of a layer.

        Raises:
            FormatError: The format can't hold it.
            ValueError: There is no such format.
        """
        if format not in FORMATS:
            raise ValueError(f"no format {format!r}; there are {', '.join(FORMATS)}")
        return cls(FORMATS[format].pack(layer.weight), layer.bias, activation)

    @property
    def packed(self) -> Packed:
        """The weight."""
        tensors = {name: getattr(self, name) for name in self._parts}
        return FORMATS[self.format].of_tensors((self.out_features, self.in_features), tensors)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]: the weight, unpacked anew by each operator that reads it.

        Models ask for its type, its shape or its device at every call.
        """
        packed = self.packed
        return packed.unpack() if torch.compiler.is_compiling() else Unpacked(packed)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: [..., in_features].

        Returns:
            [..., out_features]; under autocast in its dtype, as a dense layer's would be.

        Raises:
            ValueError: The input has another number of columns, or another dtype than the weight.
        """
        kind = x.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # kernels are of the dtype of the weight
                y = self._multiply(x.to(getattr(self, self._parts[0]).dtype))
            return y.to(torch.get_autocast_dtype(kind))
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        bias = self.bias
        fixed = bias is None or not (bias.requires_grad and torch.is_grad_enabled())
        if fixed and _is_plain(x):
            check_columns(x, self.in_features)
            prepared = self._prepared()
            found = None if prepared is None else prepared(x, bias)
            if found is not None:
                return ACTIVATIONS[self.activation](found)
        if (
            forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        ):
            raise NotImplementedError("a packed layer has no gradient in forward mode")
        return linear(x, self.packed, bias, self.activation)

    def _prepared(self) -> native.Prepared | None:
        """The kernel in C++ with this weight, which spares small layers most of the call."""
        buffers = self._buffers
        known, prepared = self._kernel
        parts = [buffers[name] for name in self._parts]
        seen = tuple((p.data_ptr(), p.numel()) for p in parts if p is not None)
        if known != seen:
            packed: Any = self.packed
            bitmap = packed.as_bitmap() if isinstance(packed, NM24) else packed
            prepared = None
            if isinstance(bitmap, Bitmap) and bitmap.values.is_cpu and native.available():
                usable = bitmap.values.dtype in native.TYPES
                prepared = native.Prepared(bitmap) if usable else None
            self._kernel = seen, prepared
        return prepared

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any,
        unexpected: Any, errors: list[str],
    ) -> None:  # fmt: skip
        """Check what is loaded: kernels trust it, and the addresses may be the same."""
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        self._kernel = (), None
        parts = [self._buffers[name] for name in self._parts]
        if not errors and all(p is not None and not p.is_meta for p in parts):
            try:
                self.packed.validate()
            except FormatError as error:
                errors.append(f"{prefix}{error.field}: {error}")

    def __getstate__(self) -> dict[str, Any]:
        """Without the prepared kernel, which holds addresses."""
        return {**self.__dict__, "_kernel": ((), None)}

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return (
            f"{self.in_features}, {self.out_features}, {self.format}, bias={self.bias is not None}"
        )


class Unpacked(Tensor):
    """A packed weight as a dense one, of which there are no numbers until an operator reads it."""

    packed: Packed

    @staticmethod
    def __new__(cls: type[Self], packed: Packed) -> Self:
        """A tensor without memory."""
        values = next(t for t in packed.tensors().values() if t.is_floating_point())
        made: Self = Tensor._make_wrapper_subclass(
            cls, packed.shape, dtype=values.dtype, device=values.device
        )
        made.packed = packed
        return made

    def __deepcopy__(self, memo: Any) -> Self:
        """The same weight, which can't be changed."""
        return type(self)(self.packed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any operator, on the numbers."""

        def numbers(x: Any) -> Any:
            return x.packed.unpack() if isinstance(x, Unpacked) else x

        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        named |= kwargs or {}
        if any(
            a.alias_info is not None and a.alias_info.is_write
            and isinstance(named.get(a.name), Unpacked)
            for a in func._schema.arguments
        ):  # fmt: skip
            raise RuntimeError(
                f"{func} would change a copy of a packed weight: make a SparseLinear of the "
                "changed one, or open the model with format='dense'"
            )
        return func(*tree_map(numbers, args), **tree_map(numbers, kwargs or {}))


def _is_plain(x: Tensor) -> bool:
    """Whether nobody watches: tracers, modes and autograd see operators, and no call of C."""
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not x.is_neg()
        and torch._C._functorch.peek_interpreter_stack() is None
    )
