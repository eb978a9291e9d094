"""What a source is, told before anything of it is loaded, and without torch."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from graphprune.checkpoints.config import read_config
from graphprune.errors import LoadError
from graphprune.files.paths import file_of, is_factory, usable

FILES = (".pt2", ".onnx")
"""Suffixes of sources that are one file."""


def check_source(source: str | Path, weights: str | Path | None = None) -> None:
    """See that a source is there and of a known kind; a hub id is taken for one.

    Args:
        source: see `graphprune.load`.
        weights: a safetensors file for the module of a factory.

    Raises:
        LoadError: it is missing, of an unknown kind, or a directory without a configuration; or
            there are weights that it doesn't take.
    """
    path = usable(source)
    if is_factory(source):
        code = file_of(source)
        if code.suffix == ".py" and not code.is_file():
            hint = near(code) or "give path/to/file.py:factory"
            raise LoadError("no such file", where=str(code), hint=hint)
        if weights is not None and not usable(weights).is_file():
            raise LoadError("no such file of weights", where=str(weights), hint=near(Path(weights)))
        return
    if weights is not None:
        raise LoadError(
            "only the module of a factory takes weights from a file of their own",
            where=str(weights),
            why=f"{source} holds its weights itself",
            hint="give the source as module:factory or file.py:factory",
        )
    if path.suffix in FILES:
        if not path.is_file():
            raise LoadError("no such file", where=str(path), hint=near(path))
    elif path.is_dir():
        configuration(path)
    elif path.exists():
        raise _unknown(path)
    elif _is_path(str(source)):
        raise LoadError(
            "no such file or directory",
            where=str(source),
            why=_missing(path),
            hint=near(path) or "check the path",
        )


def configuration(path: Path) -> dict[str, Any]:
    """The data of a checkpoint's configuration.

    Raises:
        LoadError: the directory has none, or one that no model could follow.
    """
    if not (path / "config.json").is_file():
        raise LoadError(
            "not a Hugging Face checkpoint",
            where=str(path),
            why="it has no config.json",
            hint="give a directory that save_pretrained wrote, a .pt2 file, or module:factory",
        )
    return read_config(path / "config.json")


def directory_of(source: str | Path, *, trust: bool) -> Path:
    """The directory of a checkpoint: itself, or where the hub's is kept once it is downloaded.

    Args:
        source: a directory or a hub id.
        trust: whether code of the checkpoint is wanted, too.

    Raises:
        LoadError: the hub doesn't give it, or this is a file.
    """
    path = Path(source)
    if path.is_file():
        raise _unknown(path)
    return path if path.is_dir() else _download(str(source), trust)


def _unknown(path: Path) -> LoadError:
    return LoadError(
        "a file of an unknown kind",
        where=str(path),
        hint="give a checkpoint directory, a hub id, a .pt2 or .onnx file, or file.py:factory",
    )


def near(path: Path) -> str | None:
    """A question about the entry beside a missing path whose name is nearly the same, if any."""
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"did you mean {path.parent / found[0]}?" if found else None


def _missing(path: Path) -> str | None:
    """The first directory on the way to a path that isn't there, if one isn't."""
    missing = next((p for p in reversed(path.parents) if not p.exists()), None)
    return None if missing is None else f"there is no directory {missing}"


def _is_path(source: str) -> bool:
    """Whether something that isn't there can't be a hub id: ``name`` or ``owner/name``."""
    return source.count("/") > 1 or source.startswith((".", "/", "~"))


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
            hint=near(Path(hub_id))
            or "check the spelling, or download the checkpoint and give its directory",
        ) from error
    return Path(found)
