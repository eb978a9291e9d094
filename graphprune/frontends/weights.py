"""Checkpoint tensors, memory-mapped: nothing is read before it is used."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from graphprune.errors import LoadError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def has_weights(directory: Path) -> bool:
    """Whether `directory` holds safetensors weights."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


def map_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint as views of its memory-mapped files.

    Raises:
        LoadError: a file is missing, truncated or malformed.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in _files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                    tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise LoadError(
                "can't read the weights",
                where=str(file),
                why=str(error),
                hint="the file is truncated or damaged: download or save it again",
            ) from error
    return tensors


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        return [directory / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise LoadError(
            "the index of the weights is malformed",
            where=str(index),
            why=repr(error),
            hint="download or save the checkpoint again",
        ) from error
    files = [directory / name for name in names]
    for file in files:
        if file.resolve().parent != directory.resolve() or not file.is_file():
            raise LoadError(
                "a file of the weights is missing",
                where=str(file),
                why=f"{INDEX} names it",
                hint="complete the download",
            )
    return files
