"""Whether a model reads what a source holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from graphprune.analysis.signature import Input, token_input
from graphprune.calibration.sources.arrays import ids_of
from graphprune.calibration.sources.audio import audio_input
from graphprune.calibration.sources.contents import Arrays, Content, Files, Ids, Text
from graphprune.calibration.sources.images import image_input
from graphprune.errors import LoadError


def suited(content: Content, inputs: Sequence[Input], source: str) -> Content:
    """A content of the kind that a model reads: arrays may be token ids, bytes images or sound.

    Args:
        content: what the source holds.
        inputs: of the model.
        source: for messages.

    Raises:
        LoadError: the model reads nothing of this kind, or there is nothing.
    """
    tokens, names = token_input(inputs), {i.name for i in inputs}
    if isinstance(content, Text | Ids) and tokens is None:
        raise other_kind(source, "token ids", inputs)
    if isinstance(content, Files):
        kind: Literal["images", "audio"]
        if content.kind == "either":
            kind = "audio" if audio_input(inputs) is not None else "images"
        else:
            kind = content.kind
        fitting = image_input(inputs) if kind == "images" else audio_input(inputs)
        if fitting is None:
            raise other_kind(source, kind, inputs)
        if not content.files:
            raise LoadError("there are no samples", where=source)
        return Files(kind, content.files, content.split)
    if isinstance(content, Arrays):
        arrays = dict(content.arrays)
        if not arrays:
            raise LoadError("the file holds no arrays", where=source)
        alone = next(iter(arrays.values())) if len(arrays) == 1 else None
        known = names & arrays.keys()
        if alone is not None and tokens is not None and (not known or tokens.name in known):
            return ids_of(alone, source)
        if alone is not None and not known and len(names) == 1:
            return Arrays({next(iter(names)): alone})
    return content


def other_kind(source: str, kind: str, inputs: Sequence[Input]) -> LoadError:
    """The error of data that a model doesn't read."""
    return LoadError(
        f"the model doesn't read {kind}",
        where=source,
        why=f"it reads {', '.join(_shown(inputs)) or 'nothing'}",
        hint="name what it reads as data: arrays of its inputs, a .npz or .safetensors file, or a "
        "function",
    )


def _shown(inputs: Sequence[Input]) -> Iterator[str]:
    for one in inputs:
        sizes = ", ".join("?" if s is None else str(s) for s in one.shape)
        yield f"{one.name} {str(one.dtype).removeprefix('torch.')} [{sizes}]"
