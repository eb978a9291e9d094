"""Calibration text: windows of tokens from a file, or from the text that every Python carries.

Windows are cut from one stream of tokens, end to end and without padding, so that each position
counts the same in a statistic or in a perplexity.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import LoadError

if TYPE_CHECKING:
    import torch

BUILTIN = "builtin"


def read_text(source: str | Path = BUILTIN) -> str:
    """Returns the text of a source.

    Args:
        source: ``builtin`` for the English reference text of CPython (the topics of its ``help()``,
            in alphabetical order; it differs a little between Python versions), or a path. A
            ``.jsonl`` file holds on each line a string, or an object with a string ``text``; any
            other file is UTF-8 text.

    Raises:
        LoadError: The file is missing, is not what its name says, or holds no text.
    """
    if source == BUILTIN:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LoadError(
            "the text file does not exist",
            where=str(path),
            hint=f"give the path of a text or .jsonl file, or '{BUILTIN}'",
        ) from None
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
        raise LoadError("the text file is not text", where=str(path), why=why) from None
    except OSError as error:
        raise LoadError(
            "the text file can't be read", where=str(path), why=error.strerror
        ) from None
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        text = "\n\n".join(_records(path, text))
    if not text.strip():
        raise LoadError("the text file is empty", where=str(path))
    return text


def windows(
    tokenizer: Any,
    text: str,
    *,
    length: int,
    count: int | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Cuts text into windows of tokens.

    Args:
        tokenizer: A Hugging Face tokenizer, or a callable that returns its ``input_ids``.
        text: The text, tokenised in one piece and without special tokens.
        length: Tokens in a window.
        count: Number of windows; None takes all that the text holds.
        seed: None takes the first windows; a number draws that many of all, without replacement.
            A larger count then begins with the windows of a smaller one.

    Returns:
        int64 tensor ``[count, length]``.

    Raises:
        LoadError: The text holds fewer windows than asked for.
    """
    import torch

    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    tokens = torch.as_tensor(encoded["input_ids"], dtype=torch.long)
    available = len(tokens) // length
    if available < (count or 1):
        raise LoadError(
            "the text is too short for the windows asked for",
            why=f"it has {len(tokens)} tokens, and {count or 1} x {length} are needed",
            hint="give a longer text, fewer windows or shorter ones",
        )
    stream = tokens[: available * length].view(available, length)
    count = available if count is None else count
    if seed is None:
        return stream[:count].clone()
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return stream[order[:count]]


def load_tokenizer(directory: Path) -> Any | None:
    """Returns the tokenizer of a checkpoint directory, or None if it has none.

    Raises:
        LoadError: It has one that transformers can't open.
    """
    patterns = ("tokenizer*.json", "vocab*", "*.model", "*.tiktoken")
    if not any(found for pattern in patterns for found in directory.glob(pattern)):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise LoadError(
            "transformers can't open the tokenizer",
            where=str(directory),
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint="save the tokenizer again, or remove its files",
        ) from error


def _records(path: Path, text: str) -> list[str]:
    records: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            why = error.msg
        else:
            value = record.get("text") if isinstance(record, dict) else record
            if isinstance(value, str):
                records.append(value)
                continue
            why = "it is neither a string nor an object with a string 'text'"
        raise LoadError("a line of the JSONL file holds no text", where=f"{path}:{number}", why=why)
    return records
