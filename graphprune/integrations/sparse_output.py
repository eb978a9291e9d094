"""What a callback writes when training has ended: the weights, with their zeros counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune._version import __version__
from graphprune.checkpoints.weights import map_checkpoint
from graphprune.checkpoints.writing import write_weights
from graphprune.errors import EmitError, VerifyError
from graphprune.files import replacing
from graphprune.training import GradualPruner, Pruned
from graphprune.training.core.processes import full, is_shared

REPORT = "sparsity.json"

logger = logging.getLogger(__name__)


def check_free(output: Path) -> None:
    """See that nothing would be replaced, before anything is trained.

    Raises:
        EmitError: something is there.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise EmitError(
            "the output exists already",
            where=str(output),
            hint="choose another directory, or remove it",
        )


def finish(
    pruner: GradualPruner, output: Path | None, *, beside: Any = None, first: bool = True
) -> Pruned:
    """End a training: count the zeros, tell what people should know, and write.

    Args:
        pruner: which has trained.
        output: see `write_sparse`; None to write nothing.
        beside: see `write_sparse`.
        first: see `write_sparse`.

    Raises:
        TrainingError: a zero isn't one.
        EmitError, VerifyError: see `write_sparse`.
    """
    pruned = pruner.finish()
    for note in pruned.notes:
        logger.warning(note)
    if output is not None:
        write_sparse(output, pruner.module, pruned, beside=beside, first=first)
    return pruned


@torch.no_grad()
def write_sparse(
    output: Path, module: nn.Module, pruned: Pruned, *, beside: Any = None, first: bool = True
) -> None:
    """Write a module and what was pruned of it, and count the zeros in the files.

    A model of transformers becomes a checkpoint; of any other the state dict becomes
    ``model.safetensors``. Beside them is ``sparsity.json``. All processes call this, since each may
    have a part of the weights only.

    Args:
        output: a directory, which is made.
        module: the trained module.
        pruned: what the pruner gave.
        beside: a tokenizer or processor, to be saved with a checkpoint.
        first: whether this process writes.

    Raises:
        EmitError: the file system refused, or something is there already.
        VerifyError: a zero isn't in the files.
    """
    shared = any(is_shared(parameter) for parameter in module.parameters())
    state = {
        name: full(tensor).cpu() if shared else tensor.detach()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    if not first:
        return
    check_free(output)
    with replacing(output) as directory:
        directory.mkdir()
        if (save := _saving(module)) is not None:
            save(directory, state_dict=dict(state) if shared else None)  # which it empties
            if (save := _saving(beside)) is not None:
                save(directory)
        else:
            write_weights(directory, sorted(_alone(module, state)), lambda name: state[name])
        _check(directory, module, state, pruned.masks)
        report = {"graphprune": __version__, **pruned.to_json()}
        text = json.dumps(report, indent=1) + "\n"
        (directory / REPORT).write_text(text, encoding="utf-8")


def _saving(thing: Any) -> Any:
    """How something of transformers is saved; None for anything else."""
    return getattr(thing, "save_pretrained", None)


def _alone(module: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The first name of each tensor to all of its names, as far as they are among some."""
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    tensor_of = {name: id(tensor) for name, tensor in tensors}
    found: dict[int | str, list[str]] = {}
    for name in names:
        found.setdefault(tensor_of.get(name, name), []).append(name)
    return {alike[0]: alike for alike in found.values()}


def _check(
    directory: Path, module: nn.Module, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    """See that every zero of every mask is in the files, and that it is +0.0."""
    stored = map_checkpoint(directory)
    alone = _alone(module, state)
    renamed = False
    for name, mask in masks.items():
        names = next(alike for alike in alone.values() if name in alike)
        weight = next((stored[n] for n in names if n in stored), None)
        if weight is None or weight.shape != mask.shape:
            renamed = True  # transformers stores some weights under other names, and in parts
            continue
        gone = weight[~mask.cpu()]
        if gone.count_nonzero() or gone.signbit().any():
            raise _lost(directory, name)
    if renamed:
        written = sum(_zeros(weight) for weight in stored.values())
        if written != sum(_zeros(state[name]) for name in alone):
            raise _lost(directory, "all weights together")


def _zeros(weight: Tensor) -> int:
    return int(((weight == 0) & ~weight.signbit()).sum())


def _lost(directory: Path, where: str) -> VerifyError:
    return VerifyError(
        "zeros were lost in writing",
        where=where,
        why=f"{directory.name} hasn't as many as the model",
        hint="please report it",
    )
