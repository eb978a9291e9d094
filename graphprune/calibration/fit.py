"""Making the inputs of a model of what a source holds, and checking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.analysis.program import BaseProgram, Example
from graphprune.analysis.signature import Input, token_input
from graphprune.calibration.batches import with_tokens
from graphprune.calibration.sources.section import Calibration
from graphprune.errors import LoadError, PlanError

_PADDING = ("attention_mask", "decoder_attention_mask")


def check_ids(ids: Tensor, given: Input, where: str) -> None:
    """Refuse token ids that a model has no row for.

    Raises:
        LoadError: one is negative, or not below the vocabulary.
    """
    if not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (given.bound is not None and high >= given.bound):
        bound = "its vocabulary" if given.bound is None else f"its vocabulary of {given.bound}"
        raise LoadError(
            "the tokens are not this model's",
            where=where,
            why=f"token {low if low < 0 else high} is outside of {bound}",
            hint="use the tokenizer that belongs to the model",
        )


def with_all_inputs(
    program: BaseProgram, inputs: Sequence[Input], windows: Tensor
) -> Tensor | dict[str, Tensor]:
    """Token windows with whatever else the model reads.

    An encoder-decoder reads the first half of each window in its encoder, and in its decoder the
    start token and the second half.

    Args:
        program: the program.
        inputs: its inputs.
        windows: int64 ``[windows, length]``.

    Returns:
        The windows, if they are enough; else a mapping of input name to tensor.

    Raises:
        LoadError: an input doesn't follow from tokens.
    """
    names = {i.name for i in inputs}
    if {"input_ids", "decoder_input_ids"} <= names and windows.shape[1] >= 2:
        half = windows.shape[1] // 2
        start = torch.full((len(windows), 1), _start_token(program), dtype=windows.dtype)
        decoded = torch.cat([start, windows[:, half:-1]], dim=1)
        filled = {"input_ids": windows[:, :half], "decoder_input_ids": decoded}
    elif program.example is not None and _are_enough(program.example, windows):
        return windows
    else:
        own = token_input(inputs)
        assert own is not None
        filled = {own.name: windows}
    for other in inputs:
        if other.name not in filled:
            filled[other.name] = _following(other, filled, inputs)
    return filled


def _are_enough(example: Example, windows: Tensor) -> bool:
    """Whether the trace's example says what goes with token windows."""
    try:
        with_tokens(example, windows[:1])
    except PlanError:
        return False
    return True


def checked(inputs: Sequence[Input], found: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Arrays as the model reads them, in its dtypes.

    Masks of padding that the model doesn't read may be among them.

    Raises:
        LoadError: one is missing, or no input's; or it has another size, a dtype of another kind,
            token ids out of range, or values that aren't finite.
    """
    known = {i.name: i for i in inputs}
    extra = [n for n in found if n not in known and n not in _PADDING]
    missing = [n for n in known if n not in found]
    if extra or missing:
        problems = [f"it lacks {', '.join(missing)}"] if missing else []
        problems += [f"the model doesn't read {', '.join(extra)}"] if extra else []
        raise LoadError(
            "the data doesn't have the inputs of the model",
            where=where,
            why="; ".join(problems),
            hint=f"the model reads {', '.join(known)}",
        )
    counts = {name: len(value) if value.dim() else 0 for name, value in found.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise LoadError(
            "the inputs hold different numbers of samples, or none", where=where, why=str(counts)
        )
    return {
        name: _as_read(known[name], value, where) if name in known else value
        for name, value in found.items()
    }


def _as_read(given: Input, value: Tensor, where: str) -> Tensor:
    place = f"{where}, input {given.name}"
    # The number of samples may be any: they are taken some at a time.
    fits = value.dim() == len(given.shape) and all(
        own is None or own == size
        for own, size in zip(given.shape[1:], value.shape[1:], strict=True)
    )
    if not fits:
        shown = ", ".join("?" if s is None else str(s) for s in ("samples", *given.shape[1:]))
        raise LoadError(
            "the data doesn't have the sizes that the model was traced with",
            where=place,
            why=f"{list(value.shape)}, and the model reads [{shown}]",
        )
    floating = given.dtype is not None and given.dtype.is_floating_point
    if given.dtype is None or value.is_floating_point() != floating:
        raise LoadError(
            "the data has a dtype of another kind than the model's input",
            where=place,
            why=f"{_name(value.dtype)}, and the model reads {_name(given.dtype)}",
            hint="normalise images as the model expects, and give token ids as integers",
        )
    if floating:
        finite = value.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise LoadError(
                "a number of the data is NaN or infinite",
                where=f"{place}, sample {int((~finite).nonzero()[0, 0])}",
            )
    elif value.dtype != torch.bool and given.bound is not None:
        check_ids(value, given, place)
    return value.to(given.dtype)


def _name(dtype: Any) -> str:
    return str(dtype or "strings").removeprefix("torch.")


def _following(other: Input, filled: Mapping[str, Tensor], inputs: Sequence[Input]) -> Tensor:
    """What goes with token ids under a name that says it."""
    decoder = other.name.startswith("decoder_")
    tokens = filled.get("decoder_input_ids" if decoder else "input_ids")
    tokens = next(iter(filled.values())) if tokens is None else tokens
    kind = other.name.removeprefix("decoder_")
    if len(other.shape) == 2 and other.dtype is not None:
        if kind == "attention_mask":
            return torch.ones_like(tokens, dtype=other.dtype)
        if kind == "token_type_ids":
            return torch.zeros_like(tokens, dtype=other.dtype)
        if kind == "position_ids":
            return torch.arange(tokens.shape[1]).expand(tokens.shape)
    raise LoadError(
        "token windows don't determine all inputs of the model",
        where=f"input {other.name}",
        why=f"the model reads {', '.join(i.name for i in inputs)}",
        hint="give arrays: a .npz or .safetensors file with one for each input",
    )


def _start_token(program: BaseProgram) -> int:
    """What a decoder begins with: of a checkpoint as it says, else 0, which most models have."""
    config = program.source.config if program.source else None
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def enough(available: int, wanted: Calibration, source: str, count: int) -> int:
    """The number of samples to take.

    Raises:
        LoadError: the recipe asks for more than there are.
    """
    if wanted.windows is not None and available < wanted.windows:
        raise LoadError(
            "there are not as many samples as the recipe asks for",
            where=source,
            why=f"{available}, and calibration.windows is {wanted.windows}",
            hint="leave calibration.windows out to take all",
        )
    return min(available, count)


def count_of(data: Any) -> int:
    """How many samples there are: all have a dimension for them."""
    if isinstance(data, list):
        return sum(count_of(one) for one in data)
    return max((len(leaf) for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)
                and leaf.dim()), default=0)  # fmt: skip
