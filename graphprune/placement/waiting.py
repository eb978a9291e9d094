"""Where activations wait: on the device while there is room, then in memory, then in files."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from graphprune.checkpoints.memory import available_memory, in_file
from graphprune.errors import CalibrationError
from graphprune.placement.place import Placement


@dataclass(frozen=True)
class Held:
    """How activations wait for the next partition.

    Attributes:
        dtype: floating-point ones wait in it; None leaves them in the type of the computation.
        folder: they wait in files there, which have no name and go with the last reader; None keeps
            them in memory.
    """

    dtype: torch.dtype | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, held: torch.dtype | Held | None) -> Held:
        """From a type alone, too."""
        return held if isinstance(held, Held) else cls(held)

    def away(self, x: Tensor) -> Tensor:
        """The tensor, or, where files are wanted, its copy in one, which is contiguous.

        Raises:
            CalibrationError: the file system refuses it.
        """
        if self.folder is None:
            return x
        try:
            return in_file(x, self.folder)
        except OSError as error:
            raise CalibrationError(
                "activations can't wait in a file",
                where=str(self.folder),
                why=error.strerror or str(error),
                hint="free some disk space, choose another folder, or keep them in memory",
            ) from error


SPARE = 1 << 30
"""Bytes of main memory that activations leave to everything else before they go to files."""


@dataclass
class Room:
    """Memory of a device that activations may wait in; all models of a run share it.

    Attributes:
        size: bytes; None where nobody knows how many there are.
        taken: how many of them are in use.
    """

    size: int | None = None
    taken: int = 0

    def take(self, count: int) -> bool:
        """Take so many bytes, if they are there."""
        if self.size is not None and self.taken + count > self.size:
            return False
        self.taken += count
        return True


@dataclass(frozen=True, eq=False)
class Waiting:
    """Puts activations aside, and brings them back.

    Attributes:
        how: whether they wait in files in any case; see `Held`.
        placement: where they are computed.
        room: of its device.
        folder: where files are made once main memory runs short.
    """

    how: Held
    placement: Placement
    room: Room
    folder: Path

    @classmethod
    def of(
        cls,
        how: Held,
        placement: Placement | None = None,
        room: Room | None = None,
        folder: Path | None = None,
    ) -> Waiting:
        """On the processor, unless `placement` says otherwise."""
        place = placement or Placement()
        return cls(how, place, room or Room(), folder or Path(tempfile.gettempdir()))

    @property
    def moves(self) -> bool:
        """Whether anything waits elsewhere than where it is computed."""
        return self.placement.away or self.how.folder is not None

    def put(self, x: Tensor) -> Tensor:
        """The tensor, which is contiguous, or its copy where it is to wait.

        Raises:
            CalibrationError: it doesn't fit into the files' folder.
        """
        if not self.placement.away:
            return self.how.away(x)
        if x.device.type == "cpu" or self.room.take(x.nbytes):
            return x
        if self.how.folder is not None:
            return self.how.away(x)
        if available_memory() < x.nbytes + SPARE:
            return replace(self.how, folder=self.folder).away(x)
        return _in_memory(x)

    def back(self, x: Tensor) -> Tensor:
        """The tensor where it is computed with."""
        found: Tensor = self.placement.bring(x)
        return found


def _in_memory(x: Tensor) -> Tensor:
    """A copy in main memory, which CUDA reads without another copy."""
    if x.device.type != "cuda":
        return x.cpu()
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x)
    return copy
