"""Changed weights in written files: read back, and the zeros of masks counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphprune.checkpoints.weights import map_checkpoint
from graphprune.errors import LoadError, VerifyError
from graphprune.exclusive import one_at_a_time
from graphprune.frontends.pt2.read import open_exported

TRANSPOSED = "^T"
"""Behind the name of an initialiser that holds a matrix as ``[in, out]``."""


@dataclass(frozen=True)
class Found:
    """What a written file holds of changed weights.

    Attributes:
        zeros: how many of their elements are zero.
        places: of ONNX: parameter to the initialiser with its values, with `TRANSPOSED` behind it
            where it is stored the other way round. One that the exporter has merged with something
            else has none.
    """

    zeros: int
    places: dict[str, str]


def check_written(
    path: Path, form: str, weights: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]
) -> Found:
    """See that a file holds changed weights, with all of their zeros.

    Args:
        path: the directory of a checkpoint, or the file.
        form: "hf", "pt2", "onnx" or "onnx-decoder".
        weights: what was to be written, by name.
        names: further names of tied weights.

    Raises:
        VerifyError: a zero has been lost or added.
    """
    if form.startswith("onnx"):
        return _check_onnx(path, weights)
    total = 0
    # We have written it just now.
    stored = read_weights(path, {n: (n, *names.get(n, ())) for n in weights}, trust=True)
    for name, weight in weights.items():
        wanted, count = _zeros(weight), _zeros(stored[name])
        if count != wanted or not torch.equal(stored[name], weight):
            raise _lost(path, name, wanted, count)
        total += count
    return Found(total, {})


@one_at_a_time
def read_weights(
    path: Path, names: Mapping[str, Iterable[str]], *, trust: bool = False
) -> dict[str, Tensor]:
    """Weights of a checkpoint directory or a ``.pt2`` file; those of a directory are mapped.

    Args:
        path: the file's path.
        names: name to the names that the weight may be stored under.
        trust: whether a ``.pt2`` file may run code.

    Raises:
        LoadError: it can't be read, or lacks one.
    """
    state: Mapping[str, Tensor]
    if path.suffix == ".pt2":
        state = open_exported(path, trust=trust).state_dict
    else:
        state = map_checkpoint(path)
    found = {}
    for name, others in names.items():
        stored = next((n for n in others if n in state), None)
        if stored is None:
            raise LoadError("a changed weight is missing", where=f"{path}: {name}")
        found[name] = state[stored].detach()
    return found


def read_places(path: Path, places: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of an ONNX file, ``[out, in]`` as in the model that it was made from.

    Args:
        path: the file.
        places: see `Found`.

    Raises:
        LoadError: it lacks one.
    """
    stored = _initialisers(path)
    found = {}
    for name, place in places.items():
        own = place.removesuffix(TRANSPOSED)
        if own not in stored:
            raise LoadError("a changed weight is missing", where=f"{path}: {name} as {own}")
        values = torch.from_numpy(np.array(stored[own].numpy()))
        found[name] = values.T.contiguous() if own != place else values
    return found


def _check_onnx(path: Path, weights: Mapping[str, Tensor]) -> Found:
    """Find each weight by its values; exporters store it transposed and under other names."""
    stored = _initialisers(path)
    sizes = {w.numel() for w in weights.values()}
    zeros = {n: _count(t.numpy()) for n, t in stored.items() if t.size in sizes}
    places, total, missing = {}, 0, {}
    taken = set()
    for name, weight in weights.items():
        wanted = _zeros(weight)
        array = weight.float().cpu().numpy()
        near = [n for n, count in zeros.items() if count == wanted]
        place = _place(array, {n: stored[n] for n in sorted(near, key=lambda n: n != name)})
        if place is not None:
            places[name] = place
            taken.add(place.removesuffix(TRANSPOSED))
            total += wanted
        elif like := next((n for n in near if _same_zeros(array, stored[n].numpy())), None):
            taken.add(like)
            total += wanted
        else:
            missing[name] = wanted
    # What the exporter took apart or put together: its zeros are somewhere in the other matrices.
    if missing:
        left = (t.numpy() for n, t in stored.items() if n not in taken and len(t.shape) > 1)
        rest = sum(_count(values) for values in left if values.dtype.kind == "f")
        wanted = sum(missing.values())
        if rest < wanted:
            raise _lost(path, next(iter(missing)), wanted, rest)
        total += wanted
    return Found(total, places)


def _place(array: NDArray[Any], stored: Mapping[str, ir.TensorProtocol]) -> str | None:
    for name, tensor in stored.items():
        values = tensor.numpy()
        if values.shape == array.shape and np.array_equal(values.astype(np.float32), array):
            return name
        if _turned(array, values) and np.array_equal(values.astype(np.float32).T, array):
            return name + TRANSPOSED
    return None


def _same_zeros(array: NDArray[Any], values: NDArray[Any]) -> bool:
    """Whether zeros are in the same places, as they are in kernels that a norm was merged into."""
    if values.shape == array.shape and np.array_equal(values == 0, array == 0):
        return True
    return _turned(array, values) and np.array_equal(values.T == 0, array == 0)


def _turned(array: NDArray[Any], values: NDArray[Any]) -> bool:
    return array.ndim == 2 and values.shape == array.shape[::-1]


def _initialisers(path: Path) -> dict[str, ir.TensorProtocol]:
    model = ir.load(path)
    return {
        name: value.const_value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def _count(values: NDArray[Any]) -> int:
    return int(values.size - np.count_nonzero(values))


def _lost(path: Path, name: str, wanted: int, found: int) -> VerifyError:
    return VerifyError(
        "the file doesn't hold a changed weight as it was to be written",
        where=f"{path.name}: {name}",
        why=f"it has {found:,} zeros, and {wanted:,} were to be written"
        if found != wanted
        else "it has as many zeros, and other values",
        hint="please report this",
    )
