"""Weights in safetensors files: mapped checkpoints, and state dicts for modules of one's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from graphprune.checkpoints.shards import INDEX, PACKED, SINGLE, damaged, stored_names
from graphprune.errors import LoadError
from graphprune.kernels.formats.files import load
from graphprune.kernels.formats.packed import FormatError, Packed

TURNED = "graphprune.turned"
"""Where its metadata has the names of matrices ``[inputs, outputs]``, as JSON."""
FLATTENED = "graphprune.flattened"
"""Where it has the shapes of tensors that are packed as matrices, by name, as JSON."""


@dataclass(frozen=True)
class Turned:
    """A matrix ``[inputs, outputs]`` that is packed as ``[outputs, inputs]``."""

    packed: Packed

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        outputs, inputs = self.packed.shape
        return inputs, outputs

    def unpack(self) -> torch.Tensor:
        """[inputs, outputs]."""
        return self.packed.unpack().T.contiguous()


@dataclass(frozen=True)
class Flattened:
    """A tensor that no linear layer has alone, packed as a matrix of its last sizes."""

    packed: Packed
    shape: tuple[int, ...]

    def unpack(self) -> torch.Tensor:
        """The tensor.

        Raises:
            ValueError: The matrix has another number of elements.
        """
        rows, columns = self.packed.shape
        if prod(self.shape) != rows * columns:
            raise ValueError(f"{rows} x {columns} numbers aren't of the shape {list(self.shape)}")
        return self.packed.unpack().view(self.shape)


def map_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint as views of its memory-mapped files; packed ones unpacked.

    Raises:
        LoadError: a file is missing, truncated or malformed.
    """
    if (directory / PACKED).is_file():
        found = read_packed(directory)
        return {n: unpacked(n, t, directory) for n, t in found.items()}
    tensors: dict[str, torch.Tensor] = {}
    for file, names in stored_names(directory).items():
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from error
    return tensors


Stored = torch.Tensor | Packed | Turned | Flattened
"""What a file of packed weights has for a name."""


def unpacked(name: str, weight: Stored, directory: Path) -> torch.Tensor:
    """A weight as the model has it.

    Raises:
        LoadError: its shape isn't that of what is packed.
    """
    if isinstance(weight, torch.Tensor):
        return weight
    try:
        return weight.unpack()
    except ValueError as error:
        raise _damaged(f"{directory / PACKED}, {name}", error) from error


def read_packed(directory: Path) -> dict[str, Stored]:
    """The dense and packed weights of a directory that `graphprune.packing` wrote.

    Raises:
        LoadError: the file is truncated, or a weight contradicts itself.
    """
    file = directory / PACKED
    other = next((n for n in (SINGLE, INDEX) if (directory / n).is_file()), None)
    if other is not None:
        raise LoadError(
            "the directory has two sets of weights",
            where=str(directory),
            why=f"both {PACKED} and {other} are there, and may differ",
            hint="remove the older one",
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        turned = frozenset(json.loads(metadata.get(TURNED, "[]")))
        shapes = {n: tuple(s) for n, s in json.loads(metadata.get(FLATTENED, "{}")).items()}
        found: dict[str, Stored] = {}
        for name, weight in load(file):
            found[name] = weight
            if isinstance(weight, torch.Tensor):
                continue
            if name in turned:
                found[name] = Turned(weight)
            elif name in shapes:
                found[name] = Flattened(weight, shapes[name])
        return found
    except (
        SafetensorError, OSError, FormatError, TypeError, ValueError, RuntimeError, AttributeError
    ) as error:  # fmt: skip
        raise _damaged(str(file), error) from error


def _damaged(where: str, error: Exception) -> LoadError:
    return LoadError(
        "can't read the packed weights",
        where=where,
        why=str(error),
        hint="the file is truncated or damaged: pack the checkpoint again",
    )


def fill(module: torch.nn.Module, file: Path) -> None:
    """Put the tensors of a safetensors file into a module, which may be on the meta device.

    Tied parameters need one of their names, and stay tied.

    Raises:
        LoadError: the file can't be read, a name is missing or unknown, or a shape or dtype is
            another than the module's.
    """
    if not file.is_file():
        raise LoadError("no such file of weights", where=str(file))
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise LoadError(
            "can't read the weights",
            where=str(file),
            why=str(error),
            hint="save the state dict with safetensors.torch.save_file",
        ) from error
    everything = module.state_dict(keep_vars=True)
    slots = {n: t for n, t in everything.items() if isinstance(t, torch.Tensor)}
    tied: dict[int, list[str]] = {}
    for name, tensor in slots.items():
        tied.setdefault(id(tensor), []).append(name)
    for names in tied.values():
        given = [n for n in names if n in state]
        if not given:
            raise LoadError("the file lacks a weight", where=f"{names[0]} in {file}", hint=_HINT)
        wanted, found = slots[given[0]], state[given[0]]
        if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
            raise LoadError(
                "a weight doesn't fit the module",
                where=f"{given[0]} in {file}",
                why=f"the module has {tuple(wanted.shape)} {wanted.dtype}, the file "
                f"{tuple(found.shape)} {found.dtype}",
                hint=_HINT,
            )
    unknown = [n for n in state if n not in slots]
    if unknown:
        raise LoadError(
            "the module has no such weight", where=f"{unknown[0]} in {file}", hint=_HINT
        )
    for names in tied.values():
        _place(module, names, slots[names[0]], state[next(n for n in names if n in state)])


_HINT = "the file has to hold the state dict of the factory's module, in its dtypes"


def _place(
    module: torch.nn.Module, names: list[str], old: torch.Tensor, tensor: torch.Tensor
) -> None:
    """Put one tensor, or one parameter that holds it, in the place of `old` under all its names."""
    new = tensor if old.is_meta else tensor.to(old.device)
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        slots: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        slots[leaf] = new
