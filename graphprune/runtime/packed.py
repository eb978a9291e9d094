"""Opening checkpoints whose linear layers are sparse, packed or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graphprune.checkpoints.shards import PACKED
from graphprune.checkpoints.weights import Flattened, Stored, Turned, read_packed, unpacked
from graphprune.errors import EmitError, LoadError
from graphprune.exclusive import one_at_a_time
from graphprune.frontends.hf.load import build, checkpoint_class, construct, tied_names
from graphprune.frontends.hf.weightless import parameters_on_meta
from graphprune.kernels.choose import DENSE, Table, choose
from graphprune.kernels.formats.files import FORMATS
from graphprune.kernels.formats.packed import FormatError, Packed
from graphprune.kernels.huge_pages import settle
from graphprune.kernels.linear import SparseLinear
from graphprune.progress import Part
from graphprune.runtime.formats import AUTO, check_format


def linear_weights(model: nn.Module) -> dict[str, str]:
    """Weights of linear layers that belong to one layer only, to the names of the layers.

    transformers' Conv1D is one whose weight is ``[inputs, outputs]``.
    """
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {
        f"{name}.weight": name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and uses[id(module.weight)] == 1
    }


@one_at_a_time
def open_packed(
    path: Path,
    format: str,
    tokens: tuple[int, ...],
    device: torch.device,
    progress: Any,
    *,
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> nn.Module:
    """Open a checkpoint with zeros, packed or not, as the transformers model that it is."""
    check_format(format, (*FORMATS, AUTO, "file", DENSE))
    check_device(device)
    config, model_class = checkpoint_class(path, trust=trust)
    check_plain(config, path)
    state: Mapping[str, Stored]
    if (path / PACKED).is_file():
        with parameters_on_meta():
            model = construct(model_class, config, path)
        state = read_packed(path)
    else:
        model, _ = build(path, config, model_class, allow_unused_weights=allow_unused_weights)
        state = state_of(model)
    linears = linear_weights(model)
    table = Table.usual() if format == AUTO else None
    rest: dict[str, Tensor] = {}
    done, total = 0, len(linears.keys() & state.keys())
    for name, weight in state.items():
        if name not in linears:
            rest[name] = unpacked(name, weight, path)
            continue
        done += 1
        progress(Part("opening", done, total, rest=f", {name}"))
        layer = model.get_submodule(linears[name])
        assert isinstance(layer, nn.Linear | Conv1D)
        if tuple(weight.shape) != tuple(layer.weight.shape):
            raise _another(name, f"its shape is {tuple(weight.shape)}", path)
        across = isinstance(layer, Conv1D)
        if isinstance(weight, Flattened):
            raise _another(name, "it isn't packed as a matrix", path)
        if not isinstance(weight, Tensor) and across is not isinstance(weight, Turned):
            raise _another(name, "its rows are the model's columns", path)
        matrix = weight.packed if isinstance(weight, Turned) else weight
        if isinstance(matrix, Tensor) and across:
            matrix = matrix.T
        chosen = _layout(matrix, format, tokens, table, device)
        if isinstance(chosen, Tensor):
            rest[name] = chosen.T.contiguous() if across else chosen
        else:
            _set(model, linears[name], SparseLinear(chosen, layer.bias))
    _fill(model, rest, path)
    state = rest = {}  # so that what is moved isn't held
    if device.type == "cpu":
        settle(model)
    model.to(device)
    _as_transformers_does(model, path)
    return model.eval()


def check_device(device: torch.device) -> None:
    """See that a device is there.

    Raises:
        LoadError: it isn't.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        lines = str(error).strip().splitlines()
        raise LoadError(f"there is no device {device}", why=lines[0] if lines else None) from error


def check_plain(config: Any, path: Path) -> None:
    """Refuse a quantised checkpoint.

    Raises:
        LoadError: it is one.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise LoadError(
            "a quantised checkpoint can't be packed",
            where=str(path / "config.json"),
            why="it has a quantization_config, and its weights are no plain matrices",
            hint="pack the checkpoint that it was quantised from",
        )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, tied parameters once."""
    tied = tied_names(model)
    return {n: t for n, t in model.state_dict().items() if n not in tied}


def _as_transformers_does(model: nn.Module, path: Path) -> None:
    """How a checkpoint wants its model to generate; and what would save nonsense says no."""
    if not isinstance(model, PreTrainedModel):
        return
    if (path / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)

    for part in model.modules():
        sparse = any(isinstance(m, SparseLinear) for m in part.modules())
        if isinstance(part, PreTrainedModel) and sparse:
            part.save_pretrained = _refuse_to_save  # type: ignore[method-assign]


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise EmitError(
        "a model with sparse layers can't be saved as a checkpoint",
        why="no class of transformers would open it",
        hint="copy the directory that it was opened from, or open that with format='dense' and "
        "save it to another one",
    )


def _layout(
    weight: Tensor | Packed,
    format: str,
    tokens: tuple[int, ...],
    table: Table | None,
    device: torch.device,
) -> Tensor | Packed:
    """A weight in the format that is asked for; dense where that can't hold it."""
    if format in ("file", getattr(weight, "format", "")):
        return weight
    dense = (weight if isinstance(weight, Tensor) else weight.unpack()).to(device)
    if not dense.is_floating_point() or format == DENSE:
        return dense
    if format == AUTO:
        # Nothing is gained without zeros, and measuring costs time.
        few = int(dense.count_nonzero()) > 0.7 * dense.numel()
        format = DENSE if few else choose(dense, tokens, table=table)
    if format == DENSE:
        return dense
    try:
        return FORMATS[format].pack(dense)
    except FormatError:
        return dense


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


def _fill(model: nn.Module, rest: Mapping[str, Tensor], path: Path) -> None:
    """Put in what isn't packed, and see that nothing is left without a value."""
    try:
        found = model.load_state_dict(rest, strict=False, assign=True)
    except RuntimeError as error:  # torch has no other for shapes that differ
        lines = str(error).strip().splitlines()
        raise _another(lines[-1].strip(), "its shape is another one", path) from error
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    empty = [n for n, p in model.named_parameters() if p.is_meta]
    empty += [n for n, b in model.named_buffers() if b.is_meta]
    if empty or found.unexpected_keys:
        name = empty[0] if empty else found.unexpected_keys[0]
        raise _another(name, "it is missing" if empty else "the model has no such weight", path)


def _another(name: str, why: str, path: Path) -> LoadError:
    return LoadError(
        "the packed weights don't fit the model",
        where=name,
        why=why,
        hint=f"pack the original checkpoint again; {path} was written for another model",
    )
