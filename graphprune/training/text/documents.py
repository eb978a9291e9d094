"""Documents as token ids, and which of their tokens a model is to say itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphprune.calibration.text.read import LINES, opened, parsed, record_of
from graphprune.calibration.text.tokenising import tokenised
from graphprune.errors import LoadError

OUT = -100


@dataclass(frozen=True)
class Document:
    """A document in tokens.

    Attributes:
        ids: its tokens.
        counted: whether each is one that the model is to say; None for all.
    """

    ids: Sequence[int]
    counted: Sequence[bool] | None = None


def read_documents(source: Path, tokenizer: Any) -> Iterator[Document]:
    """The documents of a file.

    Args:
        source: UTF-8 text, which is one document, or a ``.jsonl`` file. Each of its lines is a
            string, an object with one as "text", a conversation as "messages", of which only what
            the assistant says counts, or tokens as "input_ids", and "labels" of which -100 doesn't
            count.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        LoadError: the file is missing, or a line holds something else; the line is named.
    """
    if source.suffix.lower() not in LINES:
        with opened(source) as file:
            raw = file.read()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            why = f"byte {error.start} is not UTF-8"
            raise LoadError("the text file is not text", where=str(source), why=why) from None
        yield Document(tokenised(tokenizer, text).tolist())
        return
    with opened(source) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{source}:{number}"
                try:
                    record = parsed(line.decode("utf-8"), where)
                except UnicodeDecodeError:
                    raise LoadError("the line is not UTF-8", where=where) from None
                yield _document(record, tokenizer, where)


def _document(record: Any, tokenizer: Any, where: str) -> Document:
    """A line of a JSONL file as a document."""
    if isinstance(record, dict) and "messages" in record:
        return _conversation(record["messages"], tokenizer, where)
    found = record_of(record, None, where)
    if isinstance(found, str):
        return Document(tokenised(tokenizer, found).tolist())
    labels = record.get("labels") if isinstance(record, dict) else None
    if labels is None:
        return Document(found)
    right = isinstance(labels, list) and len(labels) == len(found)
    if not right or any(b not in (OUT, a) for a, b in zip(found, labels, strict=True)):
        raise LoadError(
            "the labels of a record don't fit its tokens",
            where=where,
            hint=f"give for each token itself, or {OUT} where the model need not say it",
        )
    return Document(found, [label != OUT for label in labels])


def _conversation(messages: Any, tokenizer: Any, where: str) -> Document:
    """A conversation as its template writes it; what the assistant says counts."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise LoadError(
            "a record holds no conversation",
            where=where,
            hint="give messages as objects with a role and their content",
        )
    ids: list[int] = []
    counted: list[bool] = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = _templated(tokenizer, messages[:place], where, answering=True)
            _extend(ids, counted, asked, False, where)
        said = _templated(tokenizer, messages[: place + 1], where)
        _extend(ids, counted, said, message["role"] == "assistant", where)
    return Document(ids, counted)


def _extend(
    ids: list[int], counted: list[bool], longer: list[int], counts: bool, where: str
) -> None:
    """Go on to a longer beginning of a conversation."""
    if longer[: len(ids)] != ids:
        raise LoadError(
            "the template writes the beginning of a conversation in another way when it goes on",
            where=where,
            why="so that it can't be told which tokens the assistant says",
            hint="give input_ids and labels",
        )
    counted += [counts] * (len(longer) - len(ids))
    ids[:] = longer


def _templated(
    tokenizer: Any, messages: list[Any], where: str, *, answering: bool = False
) -> list[int]:
    if not messages:
        return []
    try:
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=answering
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise LoadError(
            "the conversation can't be written by the tokenizer's template",
            where=where,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint="use the tokenizer of a model that was trained on conversations",
        ) from error
    return [int(token) for token in found["input_ids"]]
