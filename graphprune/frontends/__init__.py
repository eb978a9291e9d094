"""Front ends: from a source to a program."""

from __future__ import annotations

from pathlib import Path

from graphprune.errors import LoadError
from graphprune.frontends.factory import is_factory
from graphprune.paths import usable
from graphprune.program import BaseProgram, Program


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
        from graphprune.onnx_program import load_onnx

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
    path = usable(source)
    if is_factory(source):
        from graphprune.frontends.factory import load_factory

        return load_factory(str(source), weights)
    if weights is not None:
        raise LoadError(
            "only the module of a factory takes weights from a file of their own",
            where=str(weights),
            why=f"{source} holds its weights itself",
            hint="give the source as module:factory or file.py:factory",
        )
    if path.suffix == ".pt2":
        from graphprune.frontends.pt2 import load_pt2

        return load_pt2(path, trust=trust)
    from graphprune.frontends.hf import load_checkpoint

    if path.is_dir():
        return load_checkpoint(path, trust=trust, allow_unused_weights=allow_unused_weights)
    if path.exists():
        raise LoadError(
            "a file of an unknown kind",
            where=str(path),
            hint="give a checkpoint directory, a hub id, a .pt2 or .onnx file, or file.py:factory",
        )
    found = _download(str(source), trust)
    return load_checkpoint(found, trust=trust, allow_unused_weights=allow_unused_weights)


def _download(hub_id: str, trust: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        found = snapshot_download(hub_id, allow_patterns=[*wanted, "*.py"] if trust else wanted)
    except HFValidationError as error:
        raise LoadError("no such file or directory", where=hub_id, hint="check the path") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise LoadError(
            "no such directory, and the model hub doesn't give it",
            where=hub_id,
            why=str(error).strip().splitlines()[0][:200] if str(error).strip() else None,
            hint="check the spelling, or download the checkpoint and give its directory",
        ) from error
    return Path(found)


__all__ = ["load"]
