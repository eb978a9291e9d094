"""What a source of calibration data holds, before anything is made of it for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Text, joined by blank lines where it was several.

    Attributes:
        text: all of the text, in one piece.
        split: the part of a data set that it is from.
    """

    text: str
    split: str | None = None


@dataclass(frozen=True)
class Ids:
    """Token ids.

    Attributes:
        stream: int64 ``[tokens]``, end to end.
        row: the length of the windows that they were given in; None for other forms.
        split: the part of a data set that they are from.
    """

    stream: Tensor
    row: int | None = None
    split: str | None = None


@dataclass(frozen=True)
class File:
    """A file of an image or a recording, on disk or in memory.

    Attributes:
        name: for messages.
        content: its path, or its bytes.
    """

    name: str
    content: Path | bytes

    def opened(self) -> Path | BytesIO:
        """What image and audio libraries open."""
        return self.content if isinstance(self.content, Path) else BytesIO(self.content)


@dataclass(frozen=True)
class Files:
    """Images or recordings, in a fixed order.

    Attributes:
        kind: what they are; "either" for bytes in a data set.
        files: one each.
        split: the part of a data set that they are from.
    """

    kind: Literal["images", "audio", "either"]
    files: Sequence[File]
    split: str | None = None


@dataclass(frozen=True)
class Arrays:
    """Arrays by name; a file of one array has the name "".

    Attributes:
        arrays: ``[samples, ...]`` each.
    """

    arrays: Mapping[str, Tensor]


@dataclass(frozen=True)
class Own:
    """What a function of the user's returned.

    Attributes:
        data: see `graphprune.streaming.batches`.
    """

    data: Any


Content: TypeAlias = Text | Ids | Files | Arrays | Own
