"""How activations wait between two segments: in which type, in memory or in files."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphprune.checkpoints.memory import page_out
from graphprune.errors import CalibrationError

SMALL = 1 << 20  # bytes: less than this stays in memory


@dataclass(frozen=True)
class Held:
    """How activations wait for the next segment.

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
        if self.folder is None or x.nbytes < SMALL:
            return x
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _reserve(file.fileno(), x.nbytes)
                memory = mmap.mmap(file.fileno(), x.nbytes)
        except OSError as error:
            raise CalibrationError(
                "activations can't wait in a file",
                where=str(self.folder),
                why=error.strerror or str(error),
                hint="free some disk space, choose another folder, or keep them in memory",
            ) from error
        copy = torch.frombuffer(memory, dtype=x.dtype).view(x.shape)
        copy.copy_(x)
        page_out(copy)
        return copy


def _reserve(file: int, size: int) -> None:
    """Give a file its blocks: one that lacks them ends the process when it is written to."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
