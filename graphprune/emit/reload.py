"""Open a written checkpoint the way its users will: in a fresh process, with plain transformers.

This file is run as a script (`python -P reload.py REQUEST`), so it imports nothing of graphprune.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def outputs(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Return the floating-point tensors of a model's output by key or position.

    Complex numbers are pairs of real ones in a last dimension.

    Args:
        value: A tensor, or a nest of mappings, sequences and dataclasses; other objects (caches)
            are skipped.
        name: What the names begin with.
    """
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            value = torch.view_as_real(value.resolve_conj())
        return {name or "output": value} if value.is_floating_point() else {}
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found |= outputs(item, f"{name}.{key}" if name else str(key))
    return found


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load the checkpoint and run it.

    Args:
        request: `directory`, `module` and `class` to load it with, `trust_remote_code`,
            `attention` implementation or None, and the files `inputs` and `outputs`.

    Returns:
        What transformers said about the weights: `missing`, `unexpected` and `mismatched` names;
        and the `warnings` that came while loading. The outputs are in their file.
    """
    from safetensors.torch import save_file

    model_class = getattr(importlib.import_module(request["module"]), request["class"])
    options = {}
    if request["attention"]:
        options["attn_implementation"] = request["attention"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model, info = model_class.from_pretrained(
            request["directory"],
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=request["trust_remote_code"],
            **options,
        )
    args, kwargs = torch.load(request["inputs"], weights_only=True)
    with torch.no_grad():
        found = outputs(model.eval()(*args, **kwargs))
    save_file({name: t.contiguous() for name, t in found.items()}, request["outputs"])
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "warnings": [str(warning.message) for warning in caught],
    }


if __name__ == "__main__":
    path = Path(sys.argv[1])
    answer = run(json.loads(path.read_text()))
    path.with_name("answer.json").write_text(json.dumps(answer))
