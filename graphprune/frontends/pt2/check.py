"""What is looked at before PyTorch opens a ``.pt2`` file, which may run code when it does.

A file that ``torch.export.save`` writes of a usual program is JSON and the bytes of tensors. The
same format holds pickles (tensors of other classes, custom objects, example inputs), compiled
libraries and sizes that are evaluated; docs/security.md lists them. What is let pass here holds
none of that, and its tensors are as large as it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE
from torch.utils import _pytree as pytree

from graphprune.errors import LoadError
from graphprune.frontends.pt2.archives import Archive, Entry
from graphprune.frontends.pt2.schema import check_payloads, check_program
from graphprune.frontends.pt2.text import refused

_JSON = 2**28
_INPUTS = 2**32
_EXPANDED = 2**30
"""Bytes that tensors may take beyond what is stored of them: a row that is repeated, say."""

_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|"
    r"\.format_version|\.storage_alignment|models/[^/]+\.json|data/sample_inputs/[^/]+\.pt|"
    r"data/weights/(weight_\d+|[^/]+_weights_config\.json)|"
    r"data/constants/(tensor_\d+|[^/]+_constants_config\.json)|extra/.+"
)
_RUNS = {
    r"data/aotinductor/.*": "compiled code, which is loaded as a library",
    r"data/constants/(custom|opaque)_obj_.*": "an object of another class, which is a pickle",
    r"data/(weights|constants)/[^/]+\.pt": "tensors in the form of torch 2.8 and before, a pickle",
}


def check_pt2(path: Path) -> None:
    """See that opening a ``.pt2`` file runs no code and takes no more memory than its size.

    Raises:
        LoadError: it may, or the file is damaged.
    """
    archive = Archive.open(path, str(path))
    for name in archive.entries:
        why = next((w for form, w in _RUNS.items() if re.fullmatch(form, name)), None)
        if why is not None:
            raise refused("the file may run code", f"{path}: {name}", why)
        if not _PLAIN.fullmatch(name):
            raise refused(
                "the file has an entry that we don't know", f"{path}: {name}", "it may be code"
            )
    if archive.read("archive_format", 100) != b"pt2":
        raise LoadError("the file is no exported program", where=str(path),
                        hint="save it with torch.export.save")  # fmt: skip
    models = [n for n in archive.entries if n.startswith("models/")]
    if "models/model.json" not in models:
        raise LoadError("the file has no program of the name model", where=str(path),
                        why=f"it has {', '.join(models) or 'none'}",
                        hint="save it with torch.export.save")  # fmt: skip
    for model in models:
        try:
            _check_model(archive, model[len("models/") : -len(".json")], str(path))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise refused(
                "the program isn't as PyTorch writes it", f"{path}: {model}", repr(error)[:200]
            ) from error


def _check_model(archive: Archive, name: str, where: str) -> None:
    program = f"models/{name}.json"
    check_program(_json(archive, program, where), f"{where}: {program}")
    for kind, entry in (("weights", "weight_"), ("constants", "tensor_")):
        config = f"data/{kind}/{name}_{kind}_config.json"
        data = _json(archive, config, where)
        check_payloads(data, f"{where}: {config}")
        _check_tensors(archive, data["config"], f"data/{kind}/", entry, where)
    _check_inputs(archive, f"data/sample_inputs/{name}.pt", where)


def _json(archive: Archive, name: str, where: str) -> Any:
    try:
        return json.loads(archive.read(name, _JSON))
    except (ValueError, RecursionError) as error:
        raise LoadError(
            "an entry of the file can't be read",
            where=f"{where}: {name}",
            why=f"{type(error).__name__}: {str(error)[:200]}",
            hint="save it again with torch.export.save",
        ) from error


def _check_tensors(
    archive: Archive, config: Mapping[str, Any], folder: str, entry: str, where: str
) -> None:
    """See that the tensors are plain, and lie within what is stored of them."""
    beyond = 0
    for name, meta in config.items():
        here = f"{where}: {name}"
        file = meta["path_name"]
        if meta["use_pickle"] or not file.startswith(entry):
            raise refused("the file may run code", here, "the tensor is stored as a pickle")
        if meta.get("tensor_meta") is None or folder + file not in archive.entries:
            raise _lie(here, f"nothing is stored of it as {file}")
        beyond += _check_size(meta["tensor_meta"], archive.entries[folder + file], here)
        if beyond > _EXPANDED:
            raise _lie(here, "repeated numbers take more than 1 GiB")


def _check_size(meta: Mapping[str, Any], entry: Entry, where: str) -> int:
    """The bytes that a tensor takes beyond those that are stored."""
    sizes = [_fixed(size, where) for size in meta["sizes"]]
    strides = [_fixed(stride, where) for stride in meta["strides"]]
    offset = _fixed(meta["storage_offset"], where)
    dtype = _SERIALIZE_TO_TORCH_DTYPE.get(meta["dtype"])
    if dtype is None or len(sizes) != len(strides) or min([offset, *sizes, *strides]) < 0:
        raise _lie(where, f"sizes {sizes}, strides {strides}, offset {offset}")
    if not prod(sizes) or meta["device"]["type"] == "meta":
        return 0
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if (last + 1) * dtype.itemsize > entry.size:
        raise _lie(
            where,
            f"it takes {(last + 1) * dtype.itemsize:,} bytes, and {entry.size:,} are stored",
        )
    return max(0, prod(sizes) * int(dtype.itemsize) - entry.size)


def _fixed(size: Mapping[str, Any], where: str) -> int:
    value = size.get("as_int")
    if not isinstance(value, int):
        raise _lie(where, "its size is an expression")
    return value


def _lie(where: str, why: str) -> LoadError:
    return LoadError(
        "a tensor isn't as large as the file says",
        where=where,
        why=why,
        hint="the file is damaged or made up: save it again with torch.export.save",
    )


def _check_inputs(archive: Archive, name: str, where: str) -> None:
    """See that the example inputs are tensors and plain values.

    Where they are anything else, PyTorch tries once more and runs what the pickle says.
    """
    data = archive.read(name, _INPUTS)
    if not data:
        return
    here = f"{where}: {name}"
    if not data.startswith(b"PK"):
        raise refused("the example inputs are a pickle, which may run code", here)
    Archive.open(data, here)
    try:
        found = torch.load(BytesIO(data), weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise refused(
            "the example inputs are more than tensors, and a pickle may run code", here, why[:300]
        ) from error
    if not isinstance(found, tuple | dict):
        raise refused("the example inputs aren't as PyTorch writes them", here)
    tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    dense = sum(t.numel() * t.itemsize for t in tensors if t.layout == torch.strided)
    if dense > len(data) + _EXPANDED:
        raise _lie(here, "repeated numbers take more than 1 GiB")
