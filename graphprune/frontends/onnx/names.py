"""Names and other text in an ONNX file, which have to be text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphprune.errors import LoadError
from graphprune.files.json import shown


def check_text(message: Any, where: Path | str) -> None:
    """Refuse a file with text that isn't UTF-8: the library gives it as bytes, and they stay some.

    Args:
        message: a model, or a part of one.
        where: its file.

    Raises:
        LoadError: there is such a text.
    """
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for one in [value] if hasattr(value, "ListFields") else value:
                check_text(one, where)
        elif field.type == field.TYPE_STRING:
            for text in [value] if isinstance(value, str | bytes) else value:
                if isinstance(text, bytes):
                    raise LoadError(
                        "a name or text in the ONNX file is not UTF-8",
                        where=str(where),
                        why=f"{field.full_name} is {shown(text)}",
                        hint="is the file damaged?",
                    )
