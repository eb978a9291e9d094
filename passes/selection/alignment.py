"""Names for what sizes are aligned to, by where a model is to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graphprune.errors import RecipeError
from graphprune.options import nearest, parse_number

ALIGNMENTS: Mapping[str, int] = {"gpu": 64, "ort": 16, "gguf": 256}
"""What kernels like: tiles of matrix units on GPUs, the blocks of channels that ONNX Runtime's
kernels work on, and the blocks of GGUF's k-quants, which divide rows."""


def parse_alignment(value: object) -> int:
    """Reads ``64``, ``"64"`` or a name.

    Raises:
        ValueError: The value is none of these.
    """
    if isinstance(value, str) and value in ALIGNMENTS:
        return ALIGNMENTS[value]
    if isinstance(value, str) and not value[:1].isdigit():
        valid = [*ALIGNMENTS, "or a number"]
        raise ValueError(f"unknown alignment '{value[:80]}'; {nearest(value, valid)}")
    number = parse_number(value)
    if number != int(number) or number < 1:
        raise ValueError(f"{value!r} is no alignment: it must be a whole number of at least 1")
    return int(number)


def alignment_words(words: Iterable[str]) -> dict[str, str]:
    """Reads ``gpu``, ``64``, ``ffn=gguf`` and lists of these with commas between.

    Returns:
        Role to what was said of it; ``*`` stands for all widths.

    Raises:
        RecipeError: something is said twice, or half of a pair is missing.
    """
    found: dict[str, str] = {}
    for word in (part.strip() for text in words for part in text.split(",")):
        role, equals, value = word.rpartition("=")
        role = role if equals else "*"
        if not role or not value:
            raise RecipeError(
                f"'{word}' is no alignment",
                where="--align",
                hint="write --align gpu, --align 64 or --align ffn=64",
            )
        if role in found:
            said = "all roles" if role == "*" else f"'{role}'"
            raise RecipeError(f"the alignment of {said} is given twice", where="--align")
        found[role] = value
    return found
