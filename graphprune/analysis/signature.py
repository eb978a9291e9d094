"""What a program reads: names, sizes and dtypes of its inputs, whatever graph it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Input:
    """One tensor that a model reads.

    Attributes:
        name: as mappings of samples have it.
        shape: its sizes; None for one that may change.
        dtype: of its elements; None for what torch has no dtype for.
        bound: what its integers have to stay below, where they are looked up in a table.
        longest: the largest second size that the trace allows, where it says one.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype | None
    bound: int | None = None
    longest: int | None = None

    @property
    def is_tokens(self) -> bool:
        """Whether it may be token ids ``[batch, length]``."""
        return len(self.shape) == 2 and self.dtype in _INTEGERS


def token_input(inputs: Sequence[Input]) -> Input | None:
    """The input that token windows are for: the first matrix of integers, if there is one."""
    found = [i for i in inputs if i.is_tokens]
    return next((i for i in found if i.name == "input_ids"), found[0] if found else None)
