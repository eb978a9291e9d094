"""Tokens of many documents in a memory-mapped file, as windows to train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from graphprune.errors import LoadError
from graphprune.files import replacing
from graphprune.training.text.documents import OUT, Document, read_documents

_VERSION = 1
_READ = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """Windows of tokens, packed end to end with a separator between documents.

    It is data for `graphprune.training.recover`, and holds nothing in memory.

    Attributes:
        folder: where its files are, ``DIRECTORY/HASH``.
        length: tokens in each window.
    """

    folder: Path
    length: int
    together: ClassVar[int | None] = None

    def __len__(self) -> int:
        return len(self._tokens()) // self.length

    def digest(self) -> str:
        """Equal for equal windows."""
        return f"{self.folder.name}-{self.length}"

    def take(self, numbers: Sequence[int]) -> torch.Tensor | dict[str, torch.Tensor]:
        """Windows int64 ``[windows, length]``; where not all tokens count, with labels."""
        tokens = _windows(self._tokens(), numbers, self.length)
        counted = self.folder / "counted.bin"
        if not counted.exists():
            return tokens
        wanted = _windows(np.memmap(counted, np.uint8, "r"), numbers, self.length).bool()
        return {"input_ids": tokens, "labels": tokens.masked_fill(~wanted, OUT)}

    def _tokens(self) -> Any:
        manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        return np.memmap(self.folder / "tokens.bin", manifest["dtype"], "r")


def token_file(
    source: str | Path,
    tokenizer: Any,
    length: int,
    directory: str | Path,
    *,
    across: bool = True,
) -> TokenFile:
    """Tokenise a text once, and use the file ever after.

    Args:
        source: see `graphprune.training.text.documents.read_documents`.
        tokenizer: a Hugging Face tokenizer; its end-of-text token stands between documents.
        length: tokens in each window.
        directory: where files of tokens are kept, each under the hash of what it was made of.
        across: whether the first token of a document counts, which follows on another one.

    Raises:
        LoadError: see `read_documents`, or the text doesn't fill a window.
    """
    source = Path(source)
    folder = Path(directory) / _key(source, tokenizer, across)
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as temporary:
            _write(temporary, read_documents(source, tokenizer), tokenizer, across)
    found = TokenFile(folder, length)
    if not len(found):
        raise LoadError(
            "the text is too short for one window",
            where=str(source),
            why=f"it has {len(found._tokens())} tokens, and a window has {length}",
            hint="give a longer text, or shorter windows",
        )
    return found


def _write(folder: Path, documents: Iterator[Document], tokenizer: Any, across: bool) -> None:
    """Write documents as they come; token ids take two bytes where the vocabulary allows it."""
    folder.mkdir()
    kind = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    separator = tokenizer.eos_token_id
    all_count, first = True, True
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "counted.bin").open("wb") as flags:
        for document in documents:
            ids = [*document.ids]
            counted = [*(document.counted or [True] * len(ids))]
            if not first and separator is not None:
                ids, counted = [separator, *ids], [document.counted is None, *counted]
            if not first and not across and len(ids) > 1:
                counted[1] = False
            first = False
            all_count = all_count and all(counted)
            tokens.write(np.asarray(ids, kind).tobytes())
            flags.write(np.asarray(counted, np.uint8).tobytes())
    if all_count:
        (folder / "counted.bin").unlink()
    (folder / "manifest.json").write_text(json.dumps({"version": _VERSION, "dtype": kind.name}))


def _key(source: Path, tokenizer: Any, across: bool) -> str:
    """A hash of all that the tokens depend on."""
    digest = hashlib.sha256(f"{_VERSION} {across} {source.suffix.lower()}".encode())
    try:
        with source.open("rb") as file:
            while part := file.read(_READ):
                digest.update(part)
    except OSError as error:
        raise LoadError("the data can't be read", where=str(source), why=error.strerror) from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    template = getattr(tokenizer, "chat_template", None)
    digest.update(repr((state, template, tokenizer.eos_token_id)).encode())
    return digest.hexdigest()[:32]


def _windows(flat: Any, numbers: Sequence[int], length: int) -> torch.Tensor:
    rows = [np.asarray(flat[n * length : (n + 1) * length], np.int64) for n in numbers]
    return torch.from_numpy(np.stack(rows))
