"""Front ends: from a source to a program."""

from __future__ import annotations

from pathlib import Path

from graphprune.errors import LoadError
from graphprune.program import Program


def load(source: str | Path) -> Program:
    """Open a model: a Hugging Face directory, a hub id or a ``.pt2`` file.

    Args:
        source: path or hub id.

    Returns:
        The traced program.

    Raises:
        LoadError: the source is missing, damaged or of an unknown kind.
        TraceError: torch.export can't capture the model.
    """
    path = Path(source)
    if path.suffix == ".pt2":
        from graphprune.frontends.pt2 import load_pt2

        return load_pt2(path)
    from graphprune.frontends.hf import load_checkpoint

    if path.is_dir():
        return load_checkpoint(path)
    if path.exists():
        raise LoadError(
            "a file of an unknown kind",
            where=str(path),
            hint="give a Hugging Face directory, a hub id or a .pt2 file",
        )
    return load_checkpoint(_download(str(source)))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        )
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
