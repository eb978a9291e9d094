"""Units in words: ``0-11, 13, 15-1151``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from graphprune.files.json import shown

LARGEST = 1 << 25
"""Units of a plan; a hundred experts of 2,048 channels in each of a hundred layers are fewer."""

EXAMPLE = '"0-11, 13"'
_RANGE = re.compile(r"(0|[1-9][0-9]{0,17})(?:-(0|[1-9][0-9]{0,17}))?", re.ASCII)


def ranges_text(units: Sequence[int]) -> str:
    """Ascending units as ranges; what stands alone is a range of one, written once."""
    if not len(units):
        return ""
    breaks = [(last, first) for last, first in pairwise(units) if first != last + 1]
    begins = [units[0], *(first for _, first in breaks)]
    ends = [*(last for last, _ in breaks), units[-1]]
    pairs = zip(begins, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def parse_ranges(text: str, size: int | None, most: int = LARGEST) -> tuple[int, ...]:
    """The units that ranges stand for, ascending.

    Args:
        text: ranges with commas between them.
        size: units that there are; None where nobody knows.
        most: units that are listed at most.

    Raises:
        ValueError: the text is something else, names what there isn't, or has units twice or in
            another order.
    """
    units: list[int] = []
    before: tuple[str, int, int] | None = None
    for item in (part.strip(" ") for part in text.split(",")) if text else ():
        match = _RANGE.fullmatch(item)
        if match is None:
            raise ValueError(f"{shown(item)} is no range of units; write {EXAMPLE}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {item} descends")
        if size is not None and last >= size:
            raise ValueError(f"unit {last} isn't one of 0 to {size - 1}")
        if before is not None and first <= before[2]:
            if last >= before[1]:
                raise ValueError(f"{before[0]} and {item} overlap")
            raise ValueError(f"{item} comes after {before[0]}; ranges are ascending")
        if len(units) + last - first >= most:
            raise ValueError(f"it has more than {LARGEST:,} units")
        units += range(first, last + 1)
        before = item, first, last
    return tuple(units)
