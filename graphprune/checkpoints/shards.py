"""The files that a checkpoint's weights are in, and the names in them, before any is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from graphprune.errors import LoadError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKED = "packed.safetensors"
"""What `graphprune.packing` writes."""

MOST_NAMES = 200_000
"""Tensors in a checkpoint: about twice as many as any has."""

LARGEST_INDEX = 64 << 20
"""Bytes of an index file."""

_AGAIN = "download or save the checkpoint again"


def has_weights(directory: Path) -> bool:
    """Whether `directory` holds safetensors weights."""
    return any((directory / name).is_file() for name in (SINGLE, INDEX, PACKED))


def without_weights(path: Path | None, name: str) -> LoadError:
    """The error of a model without weights that are opened; a pickle isn't, as it may run code.

    Args:
        path: the directory of the checkpoint that the model came from.
        name: a parameter that has no value.
    """
    forms = ("pytorch_model*.bin", "*.pth", "*.ckpt") if path is not None else ()
    pickles = sorted(file for form in forms for file in Path(path or "").glob(form))
    if pickles:
        return LoadError(
            "the checkpoint's weights are pickles, which aren't opened",
            where=str(pickles[0]),
            why="a pickle may run code, and there are no safetensors files beside it",
            hint="save the model again with save_pretrained, which writes safetensors",
        )
    return LoadError(
        "the model has no weights", where=name, hint="only inspect and dry runs need none"
    )


def stored_names(directory: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint, and the names of the tensors in each.

    Raises:
        LoadError: a file is missing or damaged, the index contradicts the files, or there are more
            names than any model has.
    """
    if not (directory / INDEX).is_file():
        return {directory / SINGLE: _names(directory / SINGLE, MOST_NAMES)}
    if (directory / SINGLE).is_file():
        raise LoadError(
            "the directory has two sets of weights",
            where=str(directory),
            why=f"both {SINGLE} and {INDEX} are there, and may differ",
            hint="remove the older one",
        )
    index = _read_index(directory / INDEX)
    found: dict[Path, list[str]] = {}
    for name in sorted(set(index.values())):
        file = directory / name
        if not file.is_file():
            raise LoadError(
                "a file of the weights is missing",
                where=str(file),
                why=f"{INDEX} names it",
                hint="complete the download",
            )
        found[file] = _names(file, MOST_NAMES)
        for tensor in found[file]:
            if index.get(tensor) != name:
                raise _contradicted(directory, tensor, f"{name} has it, and {INDEX} names "
                                    f"{index.get(tensor, 'no file')} for it")  # fmt: skip
    held = {tensor for names in found.values() for tensor in names}
    missing = next((tensor for tensor in index if tensor not in held), None)
    if missing is not None:
        raise _contradicted(directory, missing, f"{index[missing]} doesn't have it")
    return found


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a checkpoint's safetensors files, from their headers.

    Raises:
        LoadError: see `stored_names`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file, names in stored_names(directory).items():
        try:
            with safe_open(file, framework="np") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from error
    return found


def _names(file: Path, most: int) -> list[str]:
    try:
        with safe_open(file, framework="np") as opened:  # without torch
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error
    if len(names) > most:
        raise _too_many(file, len(names))
    return names


def damaged(file: Path, error: Exception) -> LoadError:
    """What to say of a file that can't be read."""
    return LoadError(
        "can't read the weights",
        where=str(file),
        why=str(error),
        hint="the file is truncated or damaged: download or save it again",
    )


def _read_index(file: Path) -> dict[str, str]:
    """Name of every tensor to the name of its file."""
    if file.stat().st_size > LARGEST_INDEX:
        raise _malformed(file, f"it has {file.stat().st_size:,} bytes")
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise _malformed(file, "it is nested too deep") from error
    except ValueError as error:  # undecodable bytes are one, too
        raise _malformed(file, f"it isn't JSON: {error}") from error
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise _malformed(file, "it has no weight_map that says which file a tensor is in")
    if len(places) > MOST_NAMES:
        raise _too_many(file, len(places))
    for tensor, name in places.items():
        if not isinstance(name, str) or not name:
            raise _malformed(file, f"weight_map has {json.dumps(name)[:60]} for {tensor}, and not "
                             "the name of a file")  # fmt: skip
        if name in (".", "..") or set(name) & set("/\\:\0") or not name.isprintable():
            raise _malformed(file, f"weight_map has {json.dumps(name)[:60]} for {tensor}, which is "
                             "no file of this directory")  # fmt: skip
    return places


def _malformed(file: Path, why: str) -> LoadError:
    return LoadError("the index of the weights is malformed", where=str(file), why=why, hint=_AGAIN)


def _contradicted(directory: Path, tensor: str, why: str) -> LoadError:
    return LoadError(
        "the index of the weights contradicts their files",
        where=f"{tensor} in {directory}",
        why=why,
        hint=_AGAIN,
    )


def _too_many(file: Path, count: int) -> LoadError:
    return LoadError(
        "the file has more tensors than any model",
        where=str(file),
        why=f"it has {count:,}, and at most {MOST_NAMES:,} are read",
        hint=_AGAIN,
    )
