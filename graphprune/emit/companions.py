"""What a Hugging Face checkpoint holds beside its model: tokenizer, processor, pooling, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from graphprune.checkpoints import self_contained

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files that don't depend on the size of a model."""

_MODULES = "modules.json"
_SENTENCES = (_MODULES, "config_sentence_transformers.json", "sentence_*_config.json")


def copy_companions(source: Path, directory: Path) -> None:
    """Copy what stands beside a model.

    The modules of sentence-transformers (pooling, normalisation, dense layers) read the outputs of
    the model, whose widths never change: they are copied as they are.

    Args:
        source: the dense checkpoint.
        directory: the new one.
    """
    _copy(source, directory, _COPIED)
    modules = _modules(source)
    if modules is None:
        return
    _copy(source, directory, _SENTENCES)
    for module in modules:
        new = directory / module.relative_to(source)
        shutil.copytree(module, new, dirs_exist_ok=True)


def copy_code(source: Path, directory: Path) -> None:
    """Copy the code that a checkpoint brings along, whose classes its configurations name."""
    for file in sorted(source.glob("*.py")):
        if file.stem != self_contained.FILE:  # ours, which is written anew
            shutil.copyfile(file, directory / file.name)


def _copy(source: Path, directory: Path, patterns: tuple[str, ...]) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns):
            shutil.copyfile(file, directory / file.name)


def _modules(source: Path) -> list[Path] | None:
    """The directories of the modules after the model; None where it isn't alone in the root."""
    listed = _read(source / _MODULES)
    if not isinstance(listed, list) or not all(isinstance(m, dict) for m in listed):
        return None
    paths = [str(m.get("path", "")) for m in listed]
    if "" not in paths:  # the model is in a directory of its own: not the one that was compressed
        return None
    return list(_inside(source, [p for p in paths if p]))


def _inside(source: Path, paths: list[str]) -> Iterator[Path]:
    """Directories below a checkpoint; what a file lists elsewhere is none of its parts."""
    root = source.resolve()
    for path in paths:
        found = source / path
        if found.is_dir() and root in found.resolve().parents:
            yield found


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
