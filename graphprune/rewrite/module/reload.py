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
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SEED = 0
"""Of the random numbers that a model draws while it runs."""

OWN = "own/"
"""What the names of outputs in a model's own dtype begin with."""


def outputs(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of a model's output by key or position.

    Complex numbers are pairs of real ones in a last dimension.

    Args:
        value: A tensor, or a nest of mappings, sequences and dataclasses; other objects (caches)
            are skipped.
        name: What the names begin with.
    """
    if isinstance(value, torch.Tensor):
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return {name or "output": value}
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


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute all floating numbers in one dtype, whatever a model's code says.

    Many models compute single steps in float32 and go on in another dtype; such steps would hide
    small errors.

    Args:
        dtype: float64 or float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` with other dtypes."""
        del types
        if func is torch.ops.aten.view.dtype:
            raise RuntimeError("the bits of a floating number are those of its dtype")
        narrow = [x for x in args[:1] if isinstance(x, torch.Tensor) and self.retyped(x) is not x]
        if narrow and func._schema.is_mutable:
            raise RuntimeError(f"{func} changes a tensor of another dtype")
        args, kwargs = pytree.tree_map(self.retyped, (args, kwargs or {}))
        if func in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default):
            args = (*args[:2], False)  # half to float: only defined on half precision
        return pytree.tree_map(self.retyped, func(*args, **kwargs))

    def retyped(self, value: Any) -> Any:
        """A tensor or a dtype as it is computed in, anything else as it is."""
        if isinstance(value, torch.dtype):
            if value.is_complex:
                return self.dtype.to_complex()
            return self.dtype if value.is_floating_point else value
        if isinstance(value, torch.Tensor) and value.dtype != (new := self.retyped(value.dtype)):
            return value.to(new)
        return value


def run_widened(model: Any, inputs: Any, how: Widened) -> dict[str, torch.Tensor]:
    """Run a model with everything in one dtype; see `outputs`.

    Args:
        model: Its weights may have another dtype; each is converted where it is read.
        inputs: (args, kwargs).
        how: Converts.
    """
    args, kwargs = pytree.tree_map(how.retyped, inputs)
    with torch.no_grad(), how:
        return outputs(model(*args, **kwargs))


def run_plainly(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """Run a model as it is.

    Returns:
        Its floating-point outputs; see `outputs`. Others, such as the index of a maximum, may
        rightly be different where two of these are equal but for rounding.
    """
    args, kwargs = inputs
    with torch.no_grad():
        found = outputs(model(*args, **kwargs))
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load the checkpoint and run it.

    Args:
        request: `directory`, `module` and `class` to load it with, `trust_remote_code`,
            `attention` implementation or None, `dtype` to run it in beside its own ("float64"),
            or None, whether the `whole` of it is converted to that dtype before it runs, and the
            files `inputs` and `outputs`.

    Returns:
        What transformers said about the weights: `missing`, `unexpected` and `mismatched` names;
        and the `warnings` that came while loading. The outputs are in their file: those for the
        first inputs in the model's own dtype, "own/logits", and those for all of them in the other
        one, "0/logits".
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
    model.eval()
    probes = torch.load(request["inputs"], weights_only=True)
    torch.manual_seed(SEED)
    found = {f"{OWN}{n}": t for n, t in run_plainly(model, probes[0]).items()}
    if request["dtype"]:
        dtype = getattr(torch, request["dtype"])
        torch.set_default_dtype(dtype)  # nobody else is in this process
        if dtype == torch.float64 and request["whole"]:
            model.double()
        if hasattr(model, "set_experts_implementation"):
            # The default is an operator that has no float64. Models without experts raise.
            with suppress(ValueError, AttributeError, TypeError, KeyError):
                model.set_experts_implementation("batched_mm")
        for i, inputs in enumerate(probes):
            torch.manual_seed(SEED)
            found |= {f"{i}/{n}": t for n, t in run_widened(model, inputs, Widened(dtype)).items()}
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
