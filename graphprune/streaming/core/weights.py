"""New weights in place of a program's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.errors import LoadError, PlanError
from graphprune.placement import Placement
from graphprune.solvers.precision import finite


class Lazily(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        """`read` gives the tensor of a name."""
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TreatedWeights(Mapping[str, Tensor]):
    """The new weights of a program, by canonical name; in memory, or in safetensors files."""

    def __init__(self, program: BaseProgram) -> None:
        """No new weights yet."""
        self._program = program
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._files:
            return read_tensor(self._files[name], name)
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._held or name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._held, *self._files)))

    def __len__(self) -> int:
        return len(self._held.keys() | self._files.keys())

    def current(self, name: str) -> Tensor:
        """The new weight, or the program's own."""
        return self[name] if name in self else self._program.weights[name]

    def lazily(self, names: Sequence[str], placement: Placement) -> Mapping[str, Tensor]:
        """The current weights of some names, without gradients, each brought when asked for."""
        return Lazily(names, lambda name: placement.bring(self.current(name).detach()))

    def mapped(self, name: str) -> Tensor:
        """A new weight; one in a file is mapped, not read."""
        return (
            read_tensor(self._files[name], name, copied=False)
            if name in self._files
            else self[name]
        )

    def take(self, names: Sequence[str], name: str, weight: Tensor) -> None:
        """Keep a new weight, in the dtype of the old one.

        Args:
            names: the parameters of the group that is being treated.
            name: the parameter.
            weight: its new value.

        Raises:
            PlanError: it doesn't belong to the group, has another shape or isn't finite.
        """
        if name not in names:
            raise PlanError(
                f"the treatment changed {name}",
                where=f"the group of {names[0]}",
                why=f"the parameters of this group are {', '.join(names)}",
            )
        old = self._program.weights[name]
        if weight.shape != old.shape:
            raise PlanError(
                "a new weight has another shape",
                where=name,
                why=f"{tuple(weight.shape)} in place of {tuple(old.shape)}",
            )
        new = weight.detach().to(device=old.device, dtype=old.dtype)
        if not finite(new):
            raise PlanError(
                "a new weight is not finite",
                where=name,
                hint="the statistic may be singular: give more samples, or more damping",
            )
        if new.untyped_storage().nbytes() != new.nbytes or not new.is_contiguous():
            new = new.clone(memory_format=torch.contiguous_format)
        self._held[name] = new

    def take_from(self, other: TreatedWeights, names: Iterable[str]) -> None:
        """Keep what another one has of some names."""
        self._held.update((n, other._held[n]) for n in names if n in other._held)
        self._files.update((n, other._files[n]) for n in names if n in other._files)

    def take_file(self, path: Path) -> None:
        """Use the weights of a safetensors file, and let go of those in memory."""
        for name in tensor_names(path):
            self._held.pop(name, None)
            self._files[name] = path


def fitting(program: BaseProgram, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New weights, those in files mapped into memory.

    Raises:
        PlanError: a name is unknown, or a shape another.
    """
    held = {n: new.mapped(n) if isinstance(new, TreatedWeights) else new[n].detach() for n in new}
    for name, tensor in held.items():
        if name not in program.weights or name in program.aliases:
            raise PlanError(f"the program has no weight {name!r}", hint="give canonical names")
        shape = program.parameters[name]
        if tuple(tensor.shape) != shape:
            why = f"{tuple(tensor.shape)} in place of {shape}"
            raise PlanError("a new weight has another shape", where=name, why=why)
    return held


def read_tensor(path: Path, name: str, *, copied: bool = True) -> Tensor:
    """One tensor of a safetensors file; a copy in memory, or the mapped file.

    Raises:
        LoadError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor.clone() if copied else tensor
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def holds(path: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether a safetensors file, which another process has written, is here and has these."""
    if not path.is_file() or set(tensor_names(path)) != weights.keys():
        return False
    return all(torch.equal(read_tensor(path, n, copied=False), t) for n, t in weights.items())


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file.

    Raises:
        LoadError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> LoadError:
    """The error for a file of an interrupted run that can't be read."""
    return LoadError(
        "can't read a file of an interrupted run",
        where=str(path),
        why=str(error),
        hint="remove the directory and begin again",
    )
