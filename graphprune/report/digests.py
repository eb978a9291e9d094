"""What a run has read, by its content: SHA-256 of files, directories, text and tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.calibration.text.read import OWN_TEXTS, SELF, read_text
from graphprune.errors import LoadError
from graphprune.files.paths import file_of, is_factory
from graphprune.progress import Part

if TYPE_CHECKING:
    from torch import Tensor

    from graphprune.analysis.program import BaseProgram

Tell = Callable[[str], None]

CHUNK = 1 << 22
"""Bytes that are read at a time."""

TOLD = 1 << 28
"""Bytes between two words on how far a large file is."""


@dataclass(frozen=True)
class Digest:
    """The content of something.

    Attributes:
        of: "file", "files", "text" or "weights".
        sha256: of a file its own; of several files that of the lines ``SHA256  NAME``, as
            ``sha256sum`` prints them, in the order of the names; of text that of its UTF-8; of
            weights in memory see `weights_digest`.
        bytes: of all of it.
        files: of several files, name to SHA-256; None of anything else.
    """

    of: str
    sha256: str
    bytes: int
    files: Mapping[str, str] | None = None


def file_digest(path: Path, tell: Tell = lambda stage: None) -> Digest:
    """The content of a file.

    Args:
        path: the file's path.
        tell: told how far it is.

    Raises:
        LoadError: it can't be read.
    """
    digest, done = hashlib.sha256(), 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                if size > TOLD and done // TOLD != (done + len(chunk)) // TOLD:
                    share = round(100 * done / size)
                    tell(Part(f"hashing {path.name}", share, 100, rest=" %"))
                done += len(chunk)
    except OSError as error:
        raise LoadError("a file can't be read", where=str(path), why=error.strerror) from error
    return Digest("file", digest.hexdigest(), done)


def files_digest(files: Mapping[str, Path], tell: Tell = lambda stage: None) -> Digest:
    """The content of several files.

    Args:
        files: by the names that they are to have.
        tell: told how far it is.

    Raises:
        LoadError: one can't be read.
    """
    found = {name: file_digest(files[name], tell) for name in sorted(files)}
    lines = "".join(f"{one.sha256}  {name}\n" for name, one in found.items())
    names = {name: one.sha256 for name, one in found.items()}
    total = sum(one.bytes for one in found.values())
    return Digest("files", _sha256(lines.encode("utf-8", "surrogateescape")), total, names)


def data_digest(source: str, tell: Tell = lambda stage: None) -> Digest | None:
    """The content of what a recipe names: a file, a directory, text of our own, or code in a file.

    Args:
        source: as `graphprune.calibration` takes it.
        tell: told how far it is.

    Returns:
        None for what has no content before it is used, or none that can be read again: windows that
        the model writes, functions of installed packages, pipes.

    Raises:
        LoadError: it can't be read.
    """
    if source == SELF:
        return None
    if source in OWN_TEXTS:
        text = read_text(source).encode()
        return Digest("text", _sha256(text), len(text))
    path = file_of(source)
    if os.path.isdir(path):
        return files_digest({f.relative_to(path).as_posix(): f for f in _visible(path)}, tell)
    return file_digest(path, tell) if os.path.isfile(path) else None


def source_digest(
    program: BaseProgram, source: object, weights: str | Path | None, tell: Tell
) -> Digest:
    """The content of a model: of the files that it was read from, or of its weights.

    Args:
        program: the model.
        source: what it was loaded from.
        weights: the file with the weights of a factory's module.
        tell: told how far it is.

    Raises:
        LoadError: a file can't be read.
    """
    files = source_files(program, source, weights)
    if not files:
        return weights_digest(program)
    if len(files) == 1:
        return file_digest(next(iter(files.values())), tell)
    return files_digest(files, tell)


def source_files(
    program: BaseProgram, source: object, weights: str | Path | None
) -> dict[str, Path]:
    """The files that a model's weights and sizes come from, by name; none for one in memory.

    Code that makes weights of its own counts as none: what it makes is what matters.
    """
    found: Iterable[Path]
    if program.format == "onnx":
        found = sorted(program.files)
    elif program.source and program.source.path:
        folder = Path(program.source.path)
        kinds = ("*.safetensors", "*.safetensors.index.json", "config.json")
        code = ("*.py",) if program.source.trust else ()
        found = [file for kind in (*kinds, *code) for file in sorted(folder.glob(kind))]
    elif isinstance(source, str | Path) and Path(source).is_file():
        found = [Path(source)]
    elif weights is not None and isinstance(source, str | Path) and is_factory(source):
        found = [file for file in (file_of(source), Path(weights)) if file.is_file()]
    else:
        found = []
    return {file.name: file for file in found}


def weights_digest(program: BaseProgram) -> Digest:
    """The content of weights in memory.

    SHA-256 of, for each parameter in the order of the names, the line ``NAME DTYPE SHAPE`` and its
    elements as they lie in memory.
    """
    digest, total = hashlib.sha256(), 0
    for name in sorted(program.trainable):
        total += _update(digest, name, program.weights[name].detach())
    return Digest("weights", digest.hexdigest(), total)


def samples_digest(data: Any) -> str:
    """SHA-256 of samples: of the lines and elements of their tensors, as in `weights_digest`."""
    import torch
    from torch.utils import _pytree as pytree

    digest = hashlib.sha256()
    for place, leaf in pytree.tree_leaves_with_path(data):
        name = pytree.keystr(place)
        if hasattr(leaf, "__array__"):
            _update(digest, name, torch.as_tensor(leaf))
        else:
            digest.update(f"{name} {leaf!r}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor) -> int:
    """Add a tensor to a hash; its bytes."""
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    digest.update(f"{name} {kind} {list(tensor.shape)}\n".encode("utf-8", "surrogateescape"))
    if tensor.is_meta or not tensor.numel():
        return 0
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    raw = flat.view(torch.uint8).numpy()
    digest.update(raw)
    return int(raw.nbytes)


def _visible(folder: Path) -> list[Path]:
    """The files below a directory, without hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [p for p in files if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
