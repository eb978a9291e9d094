"""Front end for ``.pt2`` files that ``torch.export.save`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from graphprune.errors import LoadError
from graphprune.frontends.module import assemble
from graphprune.program import Program


def load_pt2(path: Path) -> Program:
    """Open an exported program.

    Raises:
        LoadError: the file is missing, damaged, or of a version that this torch can't read.
    """
    if not path.is_file():
        raise LoadError("no such file", where=str(path))
    try:
        exported = torch.export.load(path)
    except Exception as error:  # a damaged archive surfaces as many kinds of error
        raise LoadError(
            "torch.export can't open the file",
            where=str(path),
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}",
            hint="save it again with torch.export.save",
        ) from error
    example: Any = exported.example_inputs or ((), {})
    return assemble(exported, None, _tied(exported), (tuple(example[0]), dict(example[1])))


def _tied(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """Names that share one tensor to the first of them."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in exported.state_dict.items():
        if tensor.is_meta or not tensor.numel():
            continue
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        known = first.setdefault(key, name)
        if known != name:
            aliases[name] = known
    return aliases
