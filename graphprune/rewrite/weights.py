"""Sliced weights: a lazy mapping over the dense ones."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from graphprune.axes import BoolArray, counter, indices, mask, touched
from graphprune.axes.expr import IntArray
from graphprune.checkpoints import memory
from graphprune.files.refusals import refused
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Selection

PIECE = 1 << 17  # elements: half a MiB of float32, which stays in the processor's cache


class SlicedWeights(Mapping[str, torch.Tensor]):
    """Parameters and buffers of a slim model by their slim names.

    Every access cuts the dense tensor anew, so that a checkpoint can be written tensor by tensor;
    after `materialize` the cut tensors are held, in memory or in files. Tied names give the same
    tensor then.
    """

    def __init__(self, program: Program, selection: Selection, renamed: Mapping[str, str]) -> None:
        """Slices of `program.weights`; `renamed` maps dense names to slim names."""
        self._program = program
        self._selection = selection
        self._dense = {new: old for old, new in renamed.items()}
        self._held: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        old = self._dense[name]
        old = self._program.aliases.get(old, old)
        held = self._held.get(old)
        return self._cut(old) if held is None else held

    def __iter__(self) -> Iterator[str]:
        return iter(self._dense)

    def __len__(self) -> int:
        return len(self._dense)

    def materialize(self, *, release: bool = False, folder: Path | None = None) -> None:
        """Cut all tensors and hold them; in files without a name, if they are many.

        Those in files include what isn't cut, so that they share no memory with the dense model.

        Args:
            release: let go of each dense tensor as soon as it is cut (the dense program can't be
                used afterwards), so that both models never lie in memory together.
            folder: where files are made; None for the temporary folder.

        Raises:
            EmitError: the file system has no room for them.
        """
        folder = folder or Path(tempfile.gettempdir())
        large = self._bytes() > memory.HELD
        for old in {self._program.aliases.get(o, o): None for o in self._dense.values()}:
            if old in self._held:
                continue
            tensor = self._cut(old)
            if large and tensor.device.type == "cpu" and tensor.layout is torch.strided:
                with refused(folder, "the weights of the slim model can't be held in a file"):
                    tensor = memory.in_file(tensor, folder)
            self._held[old] = tensor
            if release:
                _release(self._program, old)

    def _bytes(self) -> int:
        """Of all tensors, tied ones once."""
        dims, size = self._program.typing.parameters, counter(self._selection.keep)
        names = {self._program.aliases.get(o, o) for o in self._dense.values()}
        weights = self._program.weights
        return sum(math.prod(map(size, dims[n])) * weights[n].element_size() for n in names)

    def _cut(self, old: str) -> torch.Tensor:
        tensor = self._program.weights[old]
        keep = self._selection.keep
        dims = self._program.typing.parameters[old]
        with torch.no_grad():
            tensor = _taken(
                tensor, {dim: indices(e, keep) for dim, e in enumerate(dims) if touched(e, keep)}
            )
            points = self._program.typing.stored.get(old)
            if points is not None and touched(points.axis, keep):
                tensor = _renumbered(tensor, mask(points.axis, keep))
            return tensor.detach()


def _taken(tensor: torch.Tensor, kept: Mapping[int, IntArray]) -> torch.Tensor:
    """What stays of a tensor, given the indices that stay by dimension, ascending."""
    if tensor.is_meta:
        shape = [len(kept.get(dim, range(size))) for dim, size in enumerate(tensor.shape)]
        return torch.empty(shape, dtype=tensor.dtype, device="meta") if kept else tensor
    chosen = {dim: torch.from_numpy(places).to(tensor.device) for dim, places in kept.items()}
    plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
    if plain and len(chosen) > 1 and 0 in chosen and not tensor.is_quantized:
        return _taken_by_pieces(tensor, chosen)
    for dim, places in chosen.items():
        tensor = tensor.index_select(dim, places)
    return tensor


def _taken_by_pieces(tensor: torch.Tensor, chosen: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The same for several dimensions, the first among them.

    What a dimension alone would leave is much larger than the result, and is never made as a whole.
    """
    (_, rows), *between, (last, places) = sorted(chosen.items())
    shape = [len(chosen.get(dim, range(size))) for dim, size in enumerate(tensor.shape)]
    result = tensor.new_empty(shape)
    length = max(1, PIECE // max(1, math.prod(tensor.shape[1:])))
    for start in range(0, len(rows), length):
        piece = tensor.index_select(0, rows[start : start + length])
        for dim, inner in between:
            piece = piece.index_select(dim, inner)
        torch.index_select(piece, last, places, out=result[start : start + length])
    return result


def _renumbered(places: torch.Tensor, kept: BoolArray) -> torch.Tensor:
    """The same places, counted among those that stay."""
    if places.is_meta:
        return places
    numbers = torch.from_numpy(np.cumsum(kept) - 1).to(places)
    return numbers[places]


def _release(program: Program, name: str) -> None:
    names = {name, *(a for a, c in program.aliases.items() if c == name)}
    if isinstance(program.weights, dict):
        for n in names:
            program.weights.pop(n, None)
    for state in (program.exported._state_dict, program.exported._constants):
        for n in names:
            state.pop(n, None)
    if program.module is not None:
        for n in names:
            path, _, leaf = n.rpartition(".")
            owner = program.module.get_submodule(path)
            for table in (owner._parameters, owner._buffers):
                if table.get(leaf) is not None:
                    table[leaf] = None
