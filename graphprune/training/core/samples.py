"""Samples to train on, by their numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.analysis.digest import raw_bytes
from graphprune.calibration.batches import MASKS, Batch, batches
from graphprune.errors import TrainingError
from graphprune.ir.torch.program import Program

LABELS = "labels"


@dataclass(frozen=True)
class Micro:
    """Samples that go through a model together.

    Attributes:
        given: what the data has of them, for a loss of one's own.
        args: the model's positional inputs.
        kwargs: its keyword inputs.
        tokens: int64 ``[samples, length]`` of the input that is text; None where there is none.
        valid: bool of the same shape, False at padding; None where there is none.
        labels: int64, -100 where nothing counts; None without labels.
        count: number of samples.
    """

    given: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: Tensor | None = None
    valid: Tensor | None = None
    labels: Tensor | None = None
    count: int = 1

    def to(self, device: torch.device) -> Micro:
        """The same on a device."""
        leaves = (self.given, self.args, self.kwargs, self.tokens, self.valid, self.labels)
        moved: Any = pytree.tree_map_only(Tensor, lambda x: x.to(device), leaves)
        given, args, kwargs, tokens, valid, labels = moved
        return Micro(given, args, kwargs, tokens, valid, labels, self.count)


class Samples(Protocol):
    """Data by number: a tensor, a mapping of tensors, a sequence, or a file of tokens.

    Attributes:
        together: how many samples can go through a model together; None for any number.
    """

    together: ClassVar[int | None]

    def __len__(self) -> int:
        """How many samples there are."""

    def digest(self) -> str:
        """Equal for equal data."""

    def take(self, numbers: Sequence[int]) -> Any:
        """The samples with some numbers, together."""


@dataclass(frozen=True)
class Tensors:
    """Samples in memory: a tensor ``[samples, ...]``, or a mapping of such."""

    data: Tensor | Mapping[str, Tensor]
    together: ClassVar[int | None] = None

    def __len__(self) -> int:
        counts = {len(t) for t in self._tensors()}
        if len(counts) != 1:
            raise TrainingError("the inputs hold different numbers of samples", why=str(counts))
        return counts.pop()

    def digest(self) -> str:
        """Equal for equal data."""
        return _digest(self.data)

    def take(self, numbers: Sequence[int]) -> Any:
        """The samples with some numbers, together."""
        places = torch.tensor(list(numbers))
        if isinstance(self.data, Tensor):
            return self.data[places]
        return {name: value[places] for name, value in self.data.items()}

    def _tensors(self) -> list[Tensor]:
        return [self.data] if isinstance(self.data, Tensor) else list(self.data.values())


@dataclass(frozen=True)
class Listed:
    """Samples that may be of different shapes; each goes through a model alone."""

    data: Sequence[Any]
    together: ClassVar[int | None] = 1

    def __len__(self) -> int:
        return len(self.data)

    def digest(self) -> str:
        """Equal for equal data."""
        return _digest([_plain(x) for x in self.data])

    def take(self, numbers: Sequence[int]) -> Any:
        """The sample with a number."""
        (number,) = numbers
        return self.data[number]


def samples_of(data: Any) -> Samples:
    """Data in the form that training takes.

    Args:
        data: a tensor ``[samples, ...]``, a mapping of names to such tensors, a sequence of
            samples, something with the methods of `Samples`, or a callable that returns one.

    Raises:
        TrainingError: it is something else, or there are no samples.
    """
    made = data() if callable(data) and not isinstance(data, Tensor | Mapping) else data
    found: Samples
    if isinstance(made, Tensor | Mapping):
        found = Tensors(made)
    elif hasattr(made, "take") and hasattr(made, "digest"):
        found = made
    elif isinstance(made, Sequence) and not isinstance(made, str | bytes):
        found = Listed(made)
    else:
        raise TrainingError(
            f"a {type(made).__name__} is no training data",
            hint="give a tensor of token windows, a mapping of inputs or a sequence of samples",
        )
    if not len(found):
        raise TrainingError("there is no training data", hint="give at least one sample")
    return found


Feed = Callable[[Any], Micro]
"""Makes what a model is called with of what the data has."""


@dataclass(frozen=True)
class ProgramFeed:
    """Inputs as a program takes them."""

    program: Program = field(repr=False)

    def __call__(self, given: Any) -> Micro:
        """The inputs of some samples; labels are no input."""
        part, labels = given, None
        if isinstance(part, Mapping) and LABELS in part and LABELS not in self.program.inputs:
            part = dict(part)
            labels = part.pop(LABELS)
        if isinstance(part, Mapping) and set(part) == {"input_ids"}:
            part = part["input_ids"]  # other inputs follow from the example
        if isinstance(part, Batch):
            made = part
        else:
            (made,) = batches(self.program, [part])
        named = [made.kwargs[name] for name in made.valid if name in made.kwargs]
        tokens = _tokens([*named, *made.args], made.kwargs)
        valid = next(iter(made.valid.values()), None)
        return Micro(given, made.args, dict(made.kwargs), tokens, valid, labels)


@dataclass(frozen=True)
class OwnFeed:
    """Samples as a loss of the user's takes them: only that knows how the model is called."""

    def __call__(self, given: Any) -> Micro:
        """The samples as they are."""
        return Micro(given, (), {})


@dataclass(frozen=True)
class ModuleFeed:
    """Inputs as any module takes them: mappings by keyword, tuples and tensors by position."""

    def __call__(self, given: Any) -> Micro:
        """The inputs of some samples; labels are no input."""
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(given, Mapping):
            kwargs = {k: v for k, v in given.items() if k != LABELS}
        else:
            args = tuple(given) if isinstance(given, tuple | list) else (given,)
        labels = given.get(LABELS) if isinstance(given, Mapping) else None
        tokens = _tokens(args, kwargs)
        mask = kwargs.get("attention_mask")
        valid = None if mask is None else mask.bool()
        return Micro(given, args, kwargs, tokens, valid, labels)


def _tokens(first: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """The first input that is a matrix of integers and no mask."""
    inputs = [*first, *(value for name, value in named.items() if name not in MASKS)]
    kinds = (torch.int64, torch.int32)
    found = (x for x in inputs if isinstance(x, Tensor) and x.dim() == 2 and x.dtype in kinds)
    return next(found, None)


def _plain(sample: Any) -> Any:
    return sample.leaves() if isinstance(sample, Batch) else sample


def _digest(data: Any) -> str:
    digest = hashlib.sha256()
    for place, leaf in pytree.tree_leaves_with_path(data):
        digest.update(pytree.keystr(place).encode())
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode() + raw_bytes(leaf))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]
