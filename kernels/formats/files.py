"""Packed weights in safetensors files.

A packed weight `name` is stored as ``name.shape`` and one tensor for each of its parts; which
format it has is in the file's metadata. In the formats `bitmap` and `nm24` the tensors are those of
compressed-tensors' ``sparse-bitmask`` and ``sparse-24-bitmask``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .bitmap import Bitmap
from .block import Block
from .csr import CSR
from .nm24 import NM24
from .packed import FormatError, Packed, check_shape
from .strip import Strip

FORMATS: Mapping[str, type[Packed]] = {
    kind.format: kind for kind in (Bitmap, Strip, NM24, Block, CSR)
}
"""Every format by its name."""

KEY = "graphprune.formats"
"""Where the metadata of a file has the formats, as JSON: name of a weight to name of a format."""


def save(
    path: str | Path,
    weights: Mapping[str, Tensor | Packed],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write dense and packed weights.

    Args:
        path: a file, overwritten.
        weights: by name.
        metadata: more of the file's metadata.

    Raises:
        FormatError: A name is used twice.
        OSError: The file can't be written.
    """
    from safetensors.torch import save_file

    flat: dict[str, Tensor] = {}
    formats: dict[str, str] = {}
    for name, weight in weights.items():
        parts = {name: weight} if isinstance(weight, Tensor) else _parts(name, weight)
        if not isinstance(weight, Tensor):
            formats[name] = weight.format
        for part, tensor in parts.items():
            if part in flat:
                raise FormatError("safetensors", part, "two tensors have this name")
            flat[part] = tensor.detach().contiguous()
    save_file(flat, str(path), {**(metadata or {}), KEY: json.dumps(formats)})


def load(path: str | Path) -> Iterator[tuple[str, Tensor | Packed]]:
    """Read dense and packed weights one by one; packed ones have been validated.

    Args:
        path: a file that `save` wrote; plain safetensors files have no packed weights.

    Yields:
        Names and weights, packed ones first.

    Raises:
        FormatError: A packed weight lacks a part or contradicts itself.
        safetensors.SafetensorError: The file isn't one, or is cut off.
        OSError: The file can't be read.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        formats = _formats(file.metadata() or {})
        names = set(file.keys())
        for name, format in formats.items():
            prefix = f"{name}."
            parts = {n.removeprefix(prefix): n for n in names if n.startswith(prefix)}
            names -= set(parts.values())
            found = {part: file.get_tensor(whole) for part, whole in parts.items()}
            yield name, _packed(name, format, found)
        for name in sorted(names):
            yield name, file.get_tensor(name)


def _parts(name: str, weight: Packed) -> dict[str, Tensor]:
    parts = {f"{name}.{part}": tensor for part, tensor in weight.tensors().items()}
    return {f"{name}.shape": torch.tensor(weight.shape), **parts}


def _formats(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        found = json.loads(metadata.get(KEY, "{}"))
    except json.JSONDecodeError as error:
        raise FormatError("safetensors", KEY, f"the metadata is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError("safetensors", KEY, "the metadata is no table of names")
    for name, format in found.items():
        if not isinstance(format, str) or format not in FORMATS:
            known = ", ".join(FORMATS)
            why = f"the format {format!r} is unknown; there are {known}"
            raise FormatError("safetensors", str(name), why)
    return found


def _packed(name: str, format: str, parts: Mapping[str, Tensor]) -> Packed:
    if "shape" not in parts:
        raise FormatError(format, f"{name}.shape", "not in the file")
    try:
        shape = check_shape(format, parts["shape"].flatten().tolist())
        packed = FORMATS[format].of_tensors(shape, parts)
        packed.validate()
    except KeyError as error:
        raise FormatError(format, f"{name}.{error.args[0]}", "not in the file") from error
    except FormatError as error:
        raise FormatError(format, f"{name}.{error.field}", error.why, error.offset) from error
    return packed
