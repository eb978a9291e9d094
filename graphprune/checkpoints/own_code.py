"""Code that a checkpoint brings along, which runs only where it is trusted by name.

A configuration can name classes in ``.py`` files beside it, or in another repository, under
``auto_map``; and it can name the attention or the experts of the model after a repository of
kernels, which transformers would download and run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from graphprune.errors import LoadError

_CONFIGS = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "config.json",
)
"""Where ``auto_map`` is looked for, the most particular file first."""


def named_code(file: Path) -> dict[str, str]:
    """What a JSON file of a checkpoint has in ``auto_map``: kind of class to ``module.Class``."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.get("auto_map") if isinstance(found, dict) else None
    if not isinstance(entries, dict):
        return {}
    listed = {kind: one if isinstance(one, list) else [one] for kind, one in entries.items()}
    return {k: one for k, ones in listed.items() for one in ones if isinstance(one, str)}


def untrusted(file: Path, what: str, code: Mapping[str, str]) -> LoadError:
    """The error of a part of a checkpoint that can only be opened by code of the checkpoint's own.

    Args:
        file: the configuration that names the code.
        what: the part.
        code: see `named_code`.
    """
    files = sorted({_file_of(one) for one in code.values()})
    return LoadError(
        f"{what} needs code that comes with the checkpoint, and it wasn't run",
        where=str(file),
        why=f"transformers has no class for it; auto_map names {', '.join(files)}",
        hint="read that code; if you trust it, say so with --trust (trust=True)",
    )


def _file_of(reference: str) -> str:
    repository, _, name = reference.rpartition("--")
    file = f"{name.rpartition('.')[0]}.py"
    return f"{file} of the repository {repository}" if repository else file


def open_part(auto: Any, path: Path, what: str, *, trust: bool) -> Any:
    """Open what stands beside a model: a tokenizer, an image processor, a feature extractor.

    Args:
        auto: the class of transformers that finds out the right one.
        path: the checkpoint's directory.
        what: what to call it in errors.
        trust: whether code in the directory may be run.

    Raises:
        LoadError: it needs code that isn't trusted, or that isn't there.
        Exception: whatever transformers and the libraries behind it raise.
    """
    named = {name: named_code(path / name).get(auto.__name__) for name in _CONFIGS}
    code = {name: {auto.__name__: one} for name, one in named.items() if one is not None}
    if trust:
        for one in code.values():
            check_local(path, one)
    try:
        with redirect_stdout(sys.stderr):  # what the code prints is no result of ours
            return auto.from_pretrained(path, local_files_only=True, trust_remote_code=trust)
    except ValueError as error:
        if trust or not code:
            raise
        file, one = next(iter(code.items()))
        raise untrusted(path / file, what, one) from error


def check_local(path: Path, code: Mapping[str, str]) -> None:
    """See that trusted code lies in the checkpoint's directory, where it can be read.

    Raises:
        LoadError: it is in another repository, outside, or missing.
    """
    for reference in code.values():
        module = reference.rpartition(".")[0]
        if not module.isidentifier() or not (path / f"{module}.py").is_file():
            raise LoadError(
                "the checkpoint's own code isn't in its directory",
                where=str(path),
                why=f"auto_map names {_file_of(reference)}",
                hint="copy the file into the directory, and name it as module.Class in auto_map",
            )


def is_own(model_class: type) -> bool:
    """Whether a class comes from a checkpoint's own code, as transformers imports that."""
    return model_class.__module__.partition(".")[0] == "transformers_modules"


def auto_class(config: Any, model_class: type) -> str:
    """The name of the class of transformers that finds a checkpoint's own one."""
    entries: Mapping[str, str] = config.auto_map
    found = [k for k, v in entries.items() if v.rpartition(".")[2] == model_class.__name__]
    return found[0] if found else "AutoModel"


def without_code(config: Any) -> Any:
    """The configuration, changed so that no class of transformers finds foreign code in it.

    Parts of a model are built from configurations in the configuration, which transformers asks
    about one by one.
    """
    for one in _nested(config, set()):
        vars(one).pop("auto_map", None)
    return config


def without_kernels(config: Any) -> Any:
    """The configuration, changed so that the library chooses how attention and experts compute.

    A name of a repository would be one of kernels to download and run.
    """
    for one in _nested(config, set()):
        one._attn_implementation = None
        if hasattr(one, "_experts_implementation"):
            one._experts_implementation = None
    return config


def _nested(value: Any, seen: set[int]) -> Iterator[Any]:
    """All configurations in one, itself included."""
    from transformers import PretrainedConfig

    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, PretrainedConfig):
        yield value
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _nested(one, seen)
