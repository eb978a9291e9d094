"""Arrays in files, read without executing anything: ``.npy``, ``.npz`` and ``.safetensors``."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from graphprune.calibration.sources.array_headers import (
    Form,
    check_size,
    cut,
    first_part,
    form_of,
    stored_as,
)
from graphprune.calibration.sources.contents import Ids
from graphprune.calibration.text.read import READ, opened
from graphprune.errors import LoadError

MOST = 1000
"""Parts of a .npz file."""

# What numpy, zipfile, its decompressors and safetensors raise for files of other bytes.
_DAMAGED = (
    ValueError, EOFError, OSError, LookupError, RuntimeError, TypeError, OverflowError, MemoryError,
    SyntaxError, TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, SafetensorError,
)  # fmt: skip


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a file by name; the one of a ``.npy`` file has the name "".

    Integers become int64; floating numbers and booleans stay as they are. What a file holds is
    told by its headers, before anything is read or unpacked. Of integers that are alone in a file,
    and so may be token ids, at most `READ` are read.

    Raises:
        LoadError: the file is missing, truncated or of another kind, or holds Python objects,
            which would have to be executed, no numbers, or more than `LARGEST` bytes of them.
    """
    with opened(path):  # says what is missing or not readable
        pass
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}
    try:
        return readers[path.suffix.lower()](path)
    except _DAMAGED as e:
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise LoadError(
            "the array can't be read", where=str(path), why=why, hint="is the file complete?"
        ) from e


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


def _npy(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it is no .npy file")
        file.seek(0)
        form = form_of(file, str(path))
    part = first_part(form.shape) if form.kind in "iu" else ()
    check_size([form if not part else replace(form, shape=cut(form.shape, part))], path)
    # Mapped, so that only what is taken is read.
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    return {"": _tensor(array[part], str(path))}


def _npz(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz file, or its end is missing")
    with zipfile.ZipFile(path) as archive:
        members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()
                   if i.filename.endswith(".npy")}  # fmt: skip
        if len(members) > MOST or len(archive.infolist()) > MOST:
            raise ValueError(f"it has more than {MOST} parts")
        forms = []
        for name, member in members.items():
            with archive.open(member) as file:
                forms.append(form_of(file, f"{path}, {name}"))
                if file.tell() + forms[-1].stored != member.file_size:
                    raise ValueError(f"{name} doesn't have the size that it says")
        check_size(forms, path)
        found = {}
        for name, member in members.items():
            with archive.open(member) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            found[name] = _tensor(array, f"{path}, {name}")
    return found


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        parts = {name: file.get_slice(name) for name in names}
        forms = {n: Form(tuple(p.get_shape()), *stored_as(p.get_dtype(), f"{path}, {n}"))
                 for n, p in parts.items()}  # fmt: skip
        if len(names) == 1 and forms[names[0]].kind in "iu":
            (form,) = forms.values()
            part = first_part(form.shape)
            if part:
                check_size([replace(form, shape=cut(form.shape, part))], path)
                return {names[0]: _integers(parts[names[0]][part], f"{path}, {names[0]}")}
        check_size(forms.values(), path)
        return {n: _integers(file.get_tensor(n), f"{path}, {n}") for n in names}


def _tensor(array: NDArray[Any], where: str) -> Tensor:
    kind = array.dtype.kind
    if kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise LoadError("a number is too large", where=where, why=f"{array.max()}")
    wanted = "int64" if kind in "iu" else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=wanted))


def _integers(tensor: Tensor, where: str) -> Tensor:
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return tensor
    found = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and found.numel() and int(found.min()) < 0:
        raise LoadError("a number is too large", where=where)
    return found
