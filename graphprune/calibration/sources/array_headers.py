"""What the headers of files of arrays say, before anything is read or unpacked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from graphprune.calibration.text.read import READ
from graphprune.errors import LoadError

LARGEST = 1 << 31
"""Bytes of all arrays of a file, in memory."""


@dataclass(frozen=True)
class Form:
    """What a header says of an array.

    Attributes:
        shape: its sizes.
        kind: of its elements, as numpy has it: i, u, f or b.
        itemsize: bytes of one.
    """

    shape: tuple[int, ...]
    kind: str
    itemsize: int

    @property
    def stored(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.itemsize

    @property
    def read(self) -> int:
        """Bytes in memory, where integers are int64."""
        return prod(self.shape) * (8 if self.kind in "iu" else self.itemsize)


def form_of(file: IO[bytes], where: str) -> Form:
    """The header of an array in the form of numpy.

    Raises:
        LoadError: it holds Python objects, or no numbers.
        ValueError: it is damaged.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}  # fmt: skip
    if version not in readers:
        raise ValueError(f"its format has version {version[0]}.{version[1]}")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise LoadError(
            "the array holds Python objects, which would have to be executed",
            where=where,
            hint="save numbers: numpy.save(path, array.astype('int64'))",
        )
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise _no_numbers(dtype, where)
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return Form(shape, dtype.kind, dtype.itemsize)


def check_size(forms: Iterable[Form], path: Path) -> None:
    """Refuse arrays that would take too much memory.

    Raises:
        LoadError: they have more than `LARGEST` bytes.
    """
    total = sum(form.read for form in forms)
    if total > LARGEST:
        raise LoadError(
            "the arrays are too large",
            where=str(path),
            why=f"in memory they would have {total:,} bytes, and {LARGEST:,} is the limit",
            hint="save fewer samples: 128 are taken where a recipe doesn't say more",
        )


def first_part(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The first `READ` of integers ``[tokens]`` or ``[windows, length]``; () for all of them."""
    if len(shape) not in (1, 2) or prod(shape) <= READ:
        return ()
    if len(shape) == 1:
        return (slice(READ),)
    return slice(max(1, READ // shape[1])), slice(READ)


def cut(shape: tuple[int, ...], part: tuple[slice, ...]) -> tuple[int, ...]:
    """The shape of a part of an array."""
    return tuple(len(range(size)[one]) for size, one in zip(shape, part, strict=True))


def stored_as(dtype: str, where: str) -> tuple[str, int]:
    """Kind and bytes of the elements of a tensor in a safetensors file.

    Raises:
        LoadError: they are no numbers, or of a kind that nothing computes with.
    """
    found = re.fullmatch(r"(BF|F|I|U)(16|32|64|8)|BOOL", dtype)
    if found is None or dtype == "F8":
        raise _no_numbers(dtype, where)
    if dtype == "BOOL":
        return "b", 1
    return found[1][-1].lower(), int(found[2]) // 8


def _no_numbers(dtype: object, where: str) -> LoadError:
    return LoadError(
        "the array holds no numbers that a model can read",
        where=where,
        why=f"its dtype is {dtype}",
    )
