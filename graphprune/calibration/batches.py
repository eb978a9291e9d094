"""Samples for a traced program: token windows, images, several inputs, or what a callable gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.errors import PlanError
from graphprune.ir.torch.interpreter import flat_inputs, input_names
from graphprune.ir.torch.program import Program

MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}


@dataclass(frozen=True)
class Batch:
    """Samples that go through a program together.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        valid: name of an input of token ids ``[batch, length]`` to bool of the same shape, False
            at padding. Inputs that aren't named have none.
        first: number of the first sample.
        count: number of samples.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    valid: dict[str, Tensor] = field(default_factory=dict)
    first: int = 0
    count: int = 1

    def leaves(self) -> list[Any]:
        """All inputs and masks, in a fixed order."""
        return list(pytree.tree_leaves((self.args, self.kwargs, self.valid)))


def batches(program: Program, data: Any, batch: int = 1) -> list[Batch]:
    """Samples in the form that a program takes.

    Args:
        program: the program.
        data: one of

            * int ``[samples, length]``: token windows, of one length and without padding; other
              inputs of the example that are constant, such as a mask of ones, are stretched;
            * another tensor ``[samples, ...]``, for a program with one input: images;
            * a mapping of input name to tensor ``[samples, ...]``;
            * a sequence of samples: each a tensor, a tuple of positional inputs or a mapping of
              keyword inputs, every tensor with a batch dimension; or a `Batch`;
            * a callable without arguments that returns one of these.

            Under the names of masks (``attention_mask``, ``decoder_attention_mask``) mappings say
            what is padding, which no statistic sees.
        batch: samples that go through together, where `data` is a tensor or a mapping.

    Raises:
        PlanError: there are no samples, or they don't fit the program.
    """
    if batch < 1:
        raise PlanError("a batch has at least one sample")
    if callable(data) and not isinstance(data, Tensor | Mapping | Batch):
        data = data()
    made = (p if isinstance(p, Batch) else _batch(program, p) for p in parts(data, batch))
    found = list(numbered(made))
    if not found:
        raise PlanError("there is no calibration data", hint="give at least one sample")
    for one in found:
        _check_shapes(program, one)
    return found


def with_tokens(example: tuple[Any, Any], tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with `tokens` in place of the first integer matrix.

    Raises:
        PlanError: other inputs don't follow from that.
    """
    leaves, spec = pytree.tree_flatten(example)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    first = next((i for i in places if _is_tokens(leaves[i])), None)
    others = {
        i: _stretched(leaves[i], leaves[first], tokens)
        for i in places
        if first is not None and i != first
    }
    if first is None or None in others.values():
        raise PlanError(
            "token windows don't determine all inputs of the model",
            where="the example inputs of the trace",
            hint="give whole samples as mappings of input name to tensor; a score takes a loss=, a "
            "function of (model, batch) that calls the model as it should be",
        )
    filled = [tokens if i == first else others.get(i, x) for i, x in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(filled, spec)
    return args, kwargs


def _is_tokens(value: Tensor) -> bool:
    return value.dim() == 2 and value.dtype in (torch.int64, torch.int32)


def _stretched(value: Tensor, like: Tensor, tokens: Tensor) -> Tensor | None:
    """A constant input of the example's shape, such as an attention mask, for `tokens`."""
    if value.shape != like.shape or value.is_meta or not bool((value == value[:1, :1]).all()):
        return None
    return value[:1, :1].expand(tokens.shape)


def parts(data: Any, size: int) -> Iterator[Any]:
    """Parts of the data that go through together."""
    if isinstance(data, Tensor):
        for start in range(0, len(data), size):
            yield data[start : start + size]
    elif isinstance(data, Mapping):
        counts = {name: len(value) for name, value in data.items() if isinstance(value, Tensor)}
        if len(set(counts.values())) != 1:
            raise PlanError("the inputs hold different numbers of samples", why=str(counts))
        for start in range(0, next(iter(counts.values())), size):
            part = slice(start, start + size)
            yield {n: v[part] if isinstance(v, Tensor) else v for n, v in data.items()}
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
        yield from data
    else:
        raise PlanError(
            f"a {type(data).__name__} is no calibration data",
            hint="give a tensor of samples, a mapping of inputs, a sequence of samples or a "
            "callable",
        )


def numbered(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches with the numbers of their samples."""
    first = 0
    for made in batches:
        sizes = [len(v) for v in made.leaves() if isinstance(v, Tensor) and v.dim()]
        count = sizes[0] if sizes else 1
        yield Batch(made.args, made.kwargs, made.valid, first, count)
        first += count


def halved(batches: Sequence[Batch]) -> list[Batch] | None:
    """Batches of half as many samples; None where none can be cut."""
    found = [half for one in batches for half in _halves(one)]
    return found if len(found) > len(batches) else None


def _halves(one: Batch) -> list[Batch]:
    tensors = [x for x in one.leaves() if isinstance(x, Tensor) and x.dim()]
    if one.count < 2 or any(len(x) != one.count for x in tensors):
        return [one]
    middle = (one.count + 1) // 2
    found = []
    for start, end in ((0, middle), (middle, one.count)):
        args, kwargs, valid = pytree.tree_map(
            lambda x, a=start, b=end: x[a:b] if isinstance(x, Tensor) and x.dim() else x,
            (one.args, one.kwargs, one.valid),
        )
        found.append(Batch(args, kwargs, valid, one.first + start, end - start))
    return found


def _batch(program: Program, part: Any) -> Batch:
    if isinstance(part, Mapping):
        return _named(program, dict(part))
    if isinstance(part, tuple | list):
        return Batch(tuple(part), {})
    if not isinstance(part, Tensor):
        raise PlanError(f"a {type(part).__name__} is no sample")
    if _is_tokens(part):
        return Batch(*with_tokens(program.example, part))
    leaves, spec = pytree.tree_flatten(program.example)
    if len(leaves) != 1:
        raise PlanError(
            "one tensor doesn't determine all inputs of the model",
            why=f"it takes {', '.join(input_names(program.exported))}",
            hint="give samples as mappings of input name to tensor",
        )
    args, kwargs = pytree.tree_unflatten([part], spec)
    return Batch(args, kwargs)


def _named(program: Program, part: dict[str, Any]) -> Batch:
    """Inputs by name. A mask that the model doesn't take still says what counts."""
    args, kwargs = program.example
    names = input_names(program.exported)[: len(pytree.tree_leaves(args))]
    known = {*names, *kwargs}
    valid: dict[str, Tensor] = {}
    for mask, tokens in MASKS.items():
        if mask in part and tokens in part:
            valid[tokens] = part[mask].bool()
            if mask not in known:
                check_right(part.pop(mask), mask)
    missing, unknown = sorted(known - part.keys()), sorted(part.keys() - known)
    if missing or unknown:
        raise PlanError(
            "the samples don't have the inputs of the model",
            why="; ".join(
                f"{what} {', '.join(found)}"
                for what, found in (("it lacks", missing), ("it doesn't take", unknown))
                if found
            ),
            hint=f"the model was traced with {', '.join(sorted(known))}",
        )
    return Batch(tuple(part.pop(n) for n in names), part, valid)


def check_right(mask: Tensor, name: str) -> None:
    """Padding that the model isn't told of must not reach the tokens before it."""
    if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise PlanError(
            "padding on the left would count as text",
            why=f"the model was traced without {name}",
            hint="put padding on the right, or trace the model with a mask",
        )


def _check_shapes(program: Program, batch: Batch) -> None:
    """Compare sizes with those that the trace fixed."""
    nodes = {n.name: n for n in program.exported.graph.nodes if n.op == "placeholder"}
    leaves: Sequence[Any] = flat_inputs(program.exported, (batch.args, batch.kwargs))
    for name, leaf in zip(input_names(program.exported), leaves, strict=True):
        value = nodes[name].meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(leaf, Tensor):
            continue
        traced: tuple[Any, ...] = tuple(value.shape)
        fits = leaf.dim() == len(traced) and all(
            size == own
            for size, own in zip(traced, leaf.shape, strict=True)
            if isinstance(size, int)
        )
        if not fits:
            raise PlanError(
                "a sample doesn't have the shape that the model was traced with",
                where=f"input {name}, sample {batch.first}",
                why=f"{tuple(leaf.shape)}, traced with {tuple(value.shape)}",
            )
    for name, mask in batch.valid.items():
        found = dict(zip(input_names(program.exported), leaves, strict=True)).get(name)
        if not isinstance(found, Tensor) or mask.shape != found.shape:
            raise PlanError("a mask doesn't have the shape of its input", where=name)
