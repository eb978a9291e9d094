"""Front ends: from a source to a program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.checkpoints.given import check_source, directory_of
from graphprune.files.paths import is_factory, usable

if TYPE_CHECKING:
    from graphprune.analysis.program import BaseProgram
    from graphprune.ir.torch.program import Program


def load(
    source: str | Path,
    weights: str | Path | None = None,
    *,
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> BaseProgram:
    """Open a model: a Hugging Face directory, a hub id, a ``.pt2`` or ``.onnx`` file, or own code.

    Args:
        source: path, hub id, ``package.module:factory`` or ``path/to/file.py:factory``; see
            `graphprune.frontends.factory.load_factory` for what a factory returns.
        weights: a safetensors file with the state dict of a factory's module.
        trust: whether a checkpoint or a ``.pt2`` file may run code of its own; one that would is
            refused otherwise. A factory is code, and always runs.
        allow_unused_weights: leave out what a checkpoint's files have and its model doesn't, which
            is an error otherwise.

    Returns:
        A `Program` of a PyTorch model, an `OnnxProgram` of an ONNX file.

    Raises:
        LoadError: the source is missing, damaged or of an unknown kind, or has code that isn't
            trusted.
        TraceError: torch.export can't capture the model.
    """
    path = usable(source)
    if path.suffix == ".onnx" and weights is None:
        from graphprune.frontends.onnx.load import load_onnx

        return load_onnx(path)
    return load_traced(source, weights, trust=trust, allow_unused_weights=allow_unused_weights)


def load_traced(
    source: str | Path,
    weights: str | Path | None = None,
    *,
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> Program:
    """Open a PyTorch model; as `load`, but for ONNX files.

    Raises:
        LoadError, TraceError: see `load`.
    """
    check_source(source, weights)
    if is_factory(source):
        from graphprune.frontends.factory import load_factory

        return load_factory(str(source), weights)
    if Path(source).suffix == ".pt2":
        from graphprune.frontends.pt2.read import load_pt2

        return load_pt2(Path(source), trust=trust)
    from graphprune.frontends.hf.load import load_checkpoint

    found = directory_of(source, trust=trust)
    return load_checkpoint(found, trust=trust, allow_unused_weights=allow_unused_weights)


__all__ = ["load"]
