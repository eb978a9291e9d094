"""Calibration text: windows of tokens from a file, or from text that needs none.

Windows are cut from one stream of tokens, end to end and without padding, so that each position
counts the same in a statistic or in a perplexity. `graphprune.calibration` reads other kinds of
data.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from graphprune.calibration.text.tokenising import begin_token, cut, text_tokens, tokenised
from graphprune.errors import LoadError
from graphprune.files.json import shown

if TYPE_CHECKING:
    import torch

BUILTIN = "builtin"
"""Documents of several kinds, which come with this package."""

HELP = "help"
"""CPython's English reference text: a text of one kind that every machine has."""

SELF = "self"
"""The source of windows that the model writes itself."""

OWN_TEXTS = (BUILTIN, HELP)
"""Sources of text that are no files."""

READ = 1 << 24
"""Characters, or token ids, that are read of a source; a longer one counts up to there."""

LINE = 1 << 26
"""Bytes of a line of a JSONL file, or of a JSON file, which have to be read as a whole."""

LINES = (".jsonl", ".ndjson")


def read_text(source: str | Path = BUILTIN, field: str = "text") -> str:
    """Returns the text of a source, at most about `READ` characters of it.

    Args:
        source: ``builtin`` for `graphprune.calibration.text.builtin.builtin_text`; ``help`` for the
            English reference text of CPython (the topics of its ``help()``, in alphabetical order;
            it differs a little between Python versions); or a path. A ``.jsonl`` file holds on each
            line a string, or an object with a string; any other file is UTF-8 text.
        field: Under which name objects have their string.

    Raises:
        LoadError: The file is missing, is not what its name says, or holds no text.
    """
    if source == BUILTIN:
        from graphprune.calibration.text.builtin import builtin_text  # which imports this module

        return builtin_text()
    if source == HELP:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(source)
    if path.suffix.lower() in LINES:
        text = joined(read_lines(path, field), path)
    else:
        text = _start_of(path)
    if not text.strip():
        raise LoadError("the text file is empty", where=str(path))
    return text


def read_lines(path: Path, field: str | None = None) -> list[str | list[int]]:
    """Returns what the lines of a JSONL file hold, up to `READ` characters or token ids.

    Args:
        path: The file. Each line is a string or a list of token ids, or an object with one.
        field: Its name in objects; None for ``text``, and else ``input_ids``.

    Raises:
        LoadError: The file can't be read, or a line holds something else; the line is named.
    """
    records: list[str | list[int]] = []
    total = 0
    with opened(path) as file:
        for number in count(1):
            raw = file.readline(LINE + 1) if total < READ else b""
            if not raw:
                break
            where = f"{path}:{number}"
            if len(raw) > LINE:
                raise too_long("a line", where, "write one record a line")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                why = f"byte {error.start} of line {number} is not UTF-8"
                raise LoadError("the text file is not text", where=str(path), why=why) from None
            if not line.strip():
                continue
            record = record_of(parsed(line, where), field, where)[: READ - total]
            records.append(record)
            total += len(record)
    return records


def too_long(what: str, where: str, hint: str) -> LoadError:
    """Returns the error of JSON that would take too much memory."""
    return LoadError(f"{what} has more than {LINE >> 20} MiB", where=where, hint=hint)


def joined(records: Sequence[str | list[int]], path: Path) -> str:
    """Returns the text of records.

    Raises:
        LoadError: One holds token ids.
    """
    texts = [record for record in records if isinstance(record, str)]
    if len(texts) < len(records):
        raise LoadError("token ids stand where text is needed", where=str(path), hint="give a text")
    return "\n\n".join(texts)


def parsed(text: str, where: str) -> Any:
    """Returns what JSON text says.

    Raises:
        LoadError: It is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LoadError("this is not JSON", where=where, why=error.msg) from None
    except RecursionError:
        raise LoadError("this JSON is nested too deeply", where=where) from None
    except ValueError:  # the other one that there is
        raise LoadError("a number has thousands of digits", where=where) from None


def record_of(record: Any, field: str | None, where: str) -> str | list[int]:
    """Returns the string or the token ids of one record.

    Args:
        record: It, as JSON has it.
        field: See `read_lines`.
        where: For the error.

    Raises:
        LoadError: It has neither.
    """
    value, hint = record, None
    if isinstance(record, dict):
        names = ("text", "input_ids") if field is None else (field,)
        value = next((record[name] for name in names if name in record), None)
        hint = f"its entries are {_names(record)}; name one with field"
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LoadError(
                "a record has half a character",
                where=where,
                why=f"{shown(value[error.start])} means something in a pair only, and is alone",
                hint="write the file again, as UTF-8",
            ) from None
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    wanted = field or "text"
    raise LoadError(
        "a record holds no text",
        where=where,
        why=f"it is neither a string or a list of token ids nor an object with one as '{wanted}'",
        hint=hint,
    )


def _names(record: dict[str, Any]) -> str:
    more = f" and {len(record) - 20} more" if len(record) > 20 else ""
    names = [shown(name)[1:-1] for name in islice(record, 20)]
    return f"{', '.join(names) or 'none'}{more}"


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
        text: The text, tokenised in one piece.
        length: Tokens in a window. Where the tokenizer begins every text with a token of its own,
            that is the first of each window.
        count: Number of windows; None takes all that the text holds.
        seed: None takes the first windows; a number draws that many of all, without replacement.
            A larger count then begins with the windows of a smaller one.

    Returns:
        int64 tensor ``[count, length]``.

    Raises:
        LoadError: The text holds fewer windows than asked for.
    """
    tokens, begin = tokenised(tokenizer, text), begin_token(tokenizer)
    found = cut(tokens, length, begin)
    if len(found) < (count or 1):
        raise too_short(len(tokens), count or 1, text_tokens(length, begin))
    return found[drawn(len(found), count, seed)]


def drawn(available: int, count: int | None, seed: int | None) -> torch.Tensor:
    """Returns which of so many samples are taken, int64 ``[count]``; see `windows`."""
    import torch

    count = available if count is None else min(count, available)
    if seed is None:
        return torch.arange(count)
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]


def too_short(
    tokens: int, count: int, length: int, where: str | None = None, taken: int = 0
) -> LoadError:
    """Returns the error of a text with fewer windows than are needed.

    Args:
        tokens: What it has.
        count: Windows that are needed.
        length: Of each, in tokens of the text.
        where: The text.
        taken: Tokens that it has besides, for another purpose.
    """
    beside = f" beside {taken} for the perplexity" if taken else ""
    return LoadError(
        "the text is too short for the windows asked for",
        where=where,
        why=f"it has {tokens} tokens{beside}, and {count} x {length} are needed",
        hint="give a longer text, fewer windows or shorter ones",
    )


def has_tokenizer(directory: Path) -> bool:
    """Returns whether a directory has files of a tokenizer."""
    patterns = ("tokenizer*.json", "vocab*", "*.model", "*.tiktoken")
    return any(found for pattern in patterns for found in directory.glob(pattern))


def load_tokenizer(directory: Path, *, trust: bool = False) -> Any | None:
    """Returns the tokenizer of a checkpoint directory, or None if it has none.

    Args:
        directory: It.
        trust: Whether code in the directory may be run.

    Raises:
        LoadError: It has one that transformers can't open, or that needs code which isn't trusted.
    """
    if not has_tokenizer(directory):
        return None
    from transformers import AutoTokenizer

    from graphprune.checkpoints.own_code import open_part

    try:
        return open_part(AutoTokenizer, directory, "the tokenizer", trust=trust)
    except LoadError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise LoadError(
            "transformers can't open the tokenizer",
            where=str(directory),
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint="save the tokenizer again, or remove its files",
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file of data.

    Raises:
        LoadError: It is missing or can't be read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise LoadError(
            "the data does not exist",
            where=str(path),
            hint=f"give the path of a file or directory, module:function, or '{BUILTIN}'",
        ) from None
    except OSError as error:
        raise LoadError("the data can't be read", where=str(path), why=error.strerror) from None


def _start_of(path: Path) -> str:
    """The first characters of a file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path) as file:
        raw = file.read(READ)
        try:
            # The end of what is read may be in the middle of a character.
            text = decoder.decode(raw, final=not file.read(1))
        except UnicodeDecodeError as error:
            why = f"byte {error.start} is not UTF-8"
            raise LoadError("the text file is not text", where=str(path), why=why) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as text files are read everywhere
