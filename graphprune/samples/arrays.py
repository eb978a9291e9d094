"""Arrays in files, read without executing anything: ``.npy``, ``.npz`` and ``.safetensors``."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphprune.calibration import READ, opened
from graphprune.errors import LoadError
from graphprune.samples.contents import Ids

SUFFIXES = (".npy", ".npz", ".safetensors")
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a file by name; the one of a ``.npy`` file has the name "".

    Integers become int64; floating numbers and booleans stay as they are.

    Raises:
        LoadError: the file is missing, truncated or of another kind, or holds Python objects,
            which would have to be executed, or no numbers.
    """
    with opened(path):  # says what is missing or not readable
        pass
    if path.suffix.lower() == ".safetensors":
        return {n: _integers(t, f"{path}, {n}") for n, t in _safetensors(path).items()}
    try:
        found = _npy(path) if path.suffix.lower() == ".npy" else _npz(path)
    except (ValueError, EOFError, OSError, KeyError, NotImplementedError, zipfile.BadZipFile) as e:
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        if "allow_pickle" in why:
            raise LoadError(
                "the array holds Python objects, which would have to be executed",
                where=str(path),
                hint="save numbers: numpy.save(path, array.astype('int64'))",
            ) from None
        raise LoadError(
            "the array can't be read", where=str(path), why=why, hint="is the file complete?"
        ) from e
    return {name: _tensor(array, f"{path}, {name}".rstrip(", ")) for name, array in found.items()}


def ids_of(array: Tensor, where: str) -> Ids:
    """Token ids ``[tokens]`` or ``[windows, length]``.

    Raises:
        LoadError: these are no integers, or have another number of dimensions.
    """
    if array.dtype != torch.int64 or array.dim() not in (1, 2) or not array.numel():
        raise LoadError(
            "the array holds no token ids",
            where=where,
            why=f"it is {str(array.dtype).removeprefix('torch.')} {list(array.shape)}",
            hint="token ids are integers [tokens] or [windows, length]",
        )
    return Ids(array.reshape(-1), array.shape[1] if array.dim() == 2 else None)


def ids_of_lists(lists: list[list[int]], where: str, split: str | None = None) -> Ids:
    """Token ids of several texts, end to end; of equal lengths, they are windows.

    Raises:
        LoadError: a number is too large, or there are none.
    """
    lengths = {len(one) for one in lists}
    flat = [token for one in lists for token in one][: max(READ, max(lengths, default=0))]
    if not flat:
        raise LoadError("there are no token ids", where=where)
    try:
        stream = torch.tensor(flat, dtype=torch.int64)
    except (OverflowError, RuntimeError, ValueError):
        raise LoadError("a number is too large for a token id", where=where) from None
    return Ids(stream, lengths.pop() if len(lengths) == 1 and len(lists) > 1 else None, split)


def _npy(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it is no .npy file")
    # Mapped, so that only the samples that are taken are read.
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    return {"": array}


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz file, or its end is missing")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError, ValueError) as error:
        raise LoadError(
            "the safetensors file can't be read", where=str(path), why=str(error)
        ) from error


def _tensor(array: NDArray[Any], where: str) -> Tensor:
    kind = array.dtype.kind
    if kind not in "iufb" or array.dtype.itemsize > 8:
        raise LoadError(
            "the array holds no numbers that a model can read",
            where=where,
            why=f"its dtype is {array.dtype}",
        )
    if kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise LoadError("a number is too large", where=where, why=f"{array.max()}")
    wanted = "int64" if kind in "iu" else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=wanted))


def _integers(tensor: Tensor, where: str) -> Tensor:
    if tensor.is_complex():
        raise LoadError("the array holds no numbers that a model can read", where=where,
                        why=f"its dtype is {tensor.dtype}")  # fmt: skip
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return tensor
    return tensor.to(torch.int64)
