"""Sliced weights: a lazy mapping over the dense ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from graphprune.axes import BoolArray, indices, mask, touched
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Selection


class SlicedWeights(Mapping[str, torch.Tensor]):
    """Parameters and buffers of a slim model by their slim names.

    Every access cuts the dense tensor anew, so that a checkpoint can be written tensor by tensor;
    after `materialize` the cut tensors are held. Tied names give the same tensor then.
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

    def materialize(self, *, release: bool = False) -> None:
        """Cut all tensors and hold them.

        Args:
            release: let go of each dense tensor as soon as it is cut (the dense program can't be
                used afterwards), so that both models never lie in memory together.
        """
        for old in {self._program.aliases.get(o, o): None for o in self._dense.values()}:
            if old not in self._held:
                self._held[old] = self._cut(old)
                if release:
                    _release(self._program, old)

    def _cut(self, old: str) -> torch.Tensor:
        tensor = self._program.weights[old]
        keep = self._selection.keep
        dims = self._program.typing.parameters[old]
        with torch.no_grad():
            for dim, e in enumerate(dims):
                if touched(e, keep):
                    tensor = _take(tensor, dim, indices(e, keep))
            points = self._program.typing.stored.get(old)
            if points is not None and touched(points.axis, keep):
                tensor = _renumbered(tensor, mask(points.axis, keep))
            return tensor.detach()


def _take(tensor: torch.Tensor, dim: int, kept: np.ndarray) -> torch.Tensor:
    if tensor.is_meta:
        shape = list(tensor.shape)
        shape[dim] = len(kept)
        return torch.empty(shape, dtype=tensor.dtype, device="meta")
    return tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))


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
