"""Samples for an ONNX model: arrays by the names of its inputs, or token windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from graphprune.calibration.batches import MASKS, Batch, check_right, numbered, parts
from graphprune.errors import PlanError
from graphprune.ir.onnx.program import OnnxProgram

# Inputs that follow from the shape of the token ids, by the names that exporters give them.
_ONES = frozenset(("attention_mask", "input_mask", "decoder_attention_mask"))
_MASKS = {**MASKS, "input_mask": "input_ids"}
_ZEROS = frozenset(("token_type_ids", "segment_ids"))
_PLACES = frozenset(("position_ids",))


def onnx_batches(program: OnnxProgram, data: Any, batch: int = 1) -> list[Batch]:
    """Samples in the form that an ONNX model takes; see `graphprune.streaming.batches`.

    Args:
        program: the program.
        data: one of

            * int ``[samples, length]``: token windows, of one length and without padding, for a
              model whose other inputs are a mask of ones (``attention_mask``), zeros
              (``token_type_ids``) and positions (``position_ids``);
            * another array ``[samples, ...]``, for a model with one input;
            * a mapping of input name to array ``[samples, ...]``;
            * a sequence of samples: each an array, a tuple of inputs in their order or a mapping,
              every array with a batch dimension; or a `Batch`;
            * a callable without arguments that returns one of these.

            Arrays are those of numpy or torch.
        batch: samples that go through together, where `data` is an array or a mapping.

    Raises:
        PlanError: there are no samples, or they don't fit the model.
    """
    if batch < 1:
        raise PlanError("a batch has at least one sample")
    if callable(data) and not isinstance(data, Tensor | Mapping | Batch | np.ndarray):
        data = data()
    inputs = {value.name or "": value for value in program.model.graph.inputs}
    for name, value in inputs.items():
        if not isinstance(value.type, ir.TensorType):
            raise PlanError(
                "samples for a model with inputs that are no tensors can't be made",
                where=f"input {name}",
                why=f"its type is {value.type}",
            )
    made = (_batch(inputs, part) for part in parts(_as_tensors(data), batch))
    found = list(numbered(made))
    if not found:
        raise PlanError("there is no calibration data", hint="give at least one sample")
    return found


def _as_tensors(data: Any) -> Any:
    """`data` with arrays as tensors; text stays an array."""
    if isinstance(data, Mapping):
        return {name: _as_tensors(value) for name, value in data.items()}
    if isinstance(data, np.ndarray) and data.dtype.kind in "biuf":
        return torch.from_numpy(data)
    return data


def _batch(inputs: Mapping[str, ir.Value], part: Any) -> Batch:
    if isinstance(part, Batch):
        given = dict(zip(inputs, part.args, strict=False)) | part.kwargs
        return _checked(inputs, given, dict(part.valid))
    if isinstance(part, Mapping):
        return _named(inputs, dict(part))
    if isinstance(part, tuple | list):
        return _named(inputs, dict(zip(inputs, part, strict=False)))
    part = _as_tensors(part)
    if not isinstance(part, Tensor):
        raise PlanError(f"a {type(part).__name__} is no sample")
    if len(inputs) == 1:
        return _checked(inputs, {name: part for name in inputs}, {})
    if part.dim() != 2 or part.is_floating_point():
        raise PlanError(
            "one array doesn't determine all inputs of the model",
            why=f"it takes {', '.join(inputs)}",
            hint="give samples as mappings of input name to array",
        )
    return _checked(inputs, _with_tokens(inputs, part), {})


def _with_tokens(inputs: Mapping[str, ir.Value], tokens: Tensor) -> dict[str, Any]:
    """All inputs of a model from its token ids.

    Raises:
        PlanError: others don't follow from them.
    """
    made: dict[str, Any] = {}
    for name in inputs:
        if name in _ONES:
            made[name] = torch.ones(tokens.shape, dtype=_dtype(inputs[name]))
        elif name in _ZEROS:
            made[name] = torch.zeros_like(tokens)
        elif name in _PLACES:
            made[name] = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
    others = [name for name in inputs if name not in made]
    if len(others) != 1 or not _takes_tokens(inputs[others[0]]):
        raise PlanError(
            "token windows don't determine all inputs of the model",
            where=", ".join(others) or "all inputs have names of masks",
            why="besides masks, token types and positions there has to be one input of integers "
            "[batch, length]",
            hint="give samples as mappings of input name to array",
        )
    return {name: made.get(name, tokens) for name in inputs}


def _takes_tokens(value: ir.Value) -> bool:
    rank = 2 if value.shape is None else len(value.shape)
    return rank == 2 and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _named(inputs: Mapping[str, ir.Value], given: dict[str, Any]) -> Batch:
    """Inputs by name. A mask that the model doesn't take still says what counts."""
    given = {name: _as_tensors(value) for name, value in given.items()}
    valid: dict[str, Tensor] = {}
    for mask, tokens in _MASKS.items():
        found = given.get(mask)
        if not isinstance(found, Tensor):
            continue
        if found.dim() == 2 and tokens in given and not bool(found.bool().all()):
            valid[tokens] = found.bool()
        elif not bool(found.bool().all()):
            raise PlanError(
                "padding can't be told from tokens",
                where=mask,
                why=f"it isn't [batch, length], or there is no input {tokens}",
                hint="give samples without padding",
            )
        if mask not in inputs:
            check_right(given.pop(mask), mask)
    return _checked(inputs, given, valid)


def _checked(
    inputs: Mapping[str, ir.Value], given: Mapping[str, Any], valid: dict[str, Tensor]
) -> Batch:
    """A batch of the types that the model has; shapes and names are compared."""
    missing, unknown = sorted(inputs.keys() - given.keys()), sorted(given.keys() - inputs.keys())
    if missing or unknown:
        raise PlanError(
            "the samples don't have the inputs of the model",
            why="; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("it lacks", missing), ("it doesn't take", unknown))
                if names
            ),
            hint=f"the model takes {', '.join(inputs)}",
        )
    made = {name: _fitted(value, given[name]) for name, value in inputs.items()}
    for name, mask in valid.items():
        found = made.get(name)
        if not isinstance(found, Tensor) or mask.shape != found.shape:
            raise PlanError("a mask doesn't have the shape of its input", where=name)
    return Batch((), made, valid)


def _fitted(value: ir.Value, given: Any) -> Any:
    """One input in the type of the model.

    Raises:
        PlanError: it has another kind of elements, or another shape.
    """
    if value.dtype == ir.DataType.STRING:
        return np.asarray(given, dtype=object).tolist()
    x = torch.as_tensor(given)
    wanted = _dtype(value)
    if x.is_floating_point() != wanted.is_floating_point:
        raise PlanError(
            "a sample doesn't have the type of the model's input",
            where=f"input {value.name}",
            why=f"{x.dtype} in place of {wanted}",
        )
    sizes = None if value.shape is None else [_size(dim) for dim in value.shape]
    if sizes is not None and not _fits(tuple(x.shape), sizes):
        shown = ", ".join("?" if size is None else str(size) for size in sizes)
        raise PlanError(
            "a sample doesn't have the shape of the model's input",
            where=f"input {value.name}",
            why=f"{tuple(x.shape)} in place of ({shown})",
        )
    # Memory that begins where torch's begins: kernels may depend on that.
    return x.detach().cpu().to(wanted, copy=True).contiguous()


def _dtype(value: ir.Value) -> torch.dtype:
    assert value.dtype is not None  # a tensor, as was checked
    return to_torch_dtype(value.dtype)


def _size(dim: int | ir.SymbolicDim) -> int | None:
    return dim if isinstance(dim, int) else None


def _fits(shape: tuple[int, ...], sizes: Iterable[int | None]) -> bool:
    wanted = list(sizes)
    return len(shape) == len(wanted) and all(
        size is None or own == size for own, size in zip(shape, wanted, strict=True)
    )
