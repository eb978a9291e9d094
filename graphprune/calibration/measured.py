"""The texts that a model is measured on, and their windows.

A model stays good at what it was calibrated on, so that one text alone says too little: there is
always a second of another kind. None of their tokens is calibrated on, whatever the sources are
called. They don't depend on what else a recipe asks for, so that two compilations of a model are
measured on the same.
"""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.sources.amounts import MEASURED
from graphprune.calibration.sources.contents import Content, Text
from graphprune.calibration.sources.read import read
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.text.read import BUILTIN, HELP, OWN_TEXTS, SELF, drawn, too_short
from graphprune.calibration.text.tokenising import cut, text_tokens
from graphprune.calibration.tokens import Stream, draw_seed, stream_of
from graphprune.errors import LoadError


@dataclass(frozen=True)
class Measured:
    """A text to measure on.

    Attributes:
        source: as recipes name it.
        strict: whether it has to hold as many windows as the recipe says: not where it was chosen
            for whoever wrote the recipe.
    """

    source: str
    strict: bool = False


def measured_texts(
    program: BaseProgram, wanted: Calibration, content: Content | None = None
) -> tuple[Measured, ...]:
    """The texts that a language model is measured on.

    The recipe's; or else what of the data is text; or else the built-in one. A text that is alone
    is joined by the built-in one, or by CPython's help where it is that.

    Args:
        program: the dense model.
        wanted: the section of the recipe.
        content: what its data holds, if it has been read.

    Raises:
        GraphPruneError: see `graphprune.calibration.sources.read.read`.
    """
    if wanted.text:
        found = [Measured(source, True) for source in dict.fromkeys(wanted.text)]
    elif isinstance(wanted.data, dict):
        found = _long_parts(program, wanted)
    elif wanted.data is None or wanted.data in (*OWN_TEXTS, SELF):
        found = [Measured(wanted.data if wanted.data in OWN_TEXTS else BUILTIN)]
    else:
        content = read(wanted.data, wanted) if content is None else content
        found = [Measured(wanted.data, True) if isinstance(content, Text) else Measured(BUILTIN)]
    found = found or [Measured(BUILTIN)]
    if len(found) == 1:
        found.append(Measured(HELP if found[0].source == BUILTIN else BUILTIN))
    return tuple(found)


def evaluation_windows(
    program: BaseProgram, wanted: Calibration, seed: int, text: Measured
) -> Tensor:
    """The windows of one text that a language model is measured on.

    Args:
        program: the dense model.
        wanted: the section of the recipe.
        seed: of the draw.
        text: one of `measured_texts`.

    Returns:
        int64 ``[count, length]``.

    Raises:
        LoadError: there is no tokenizer, or the text is missing, too short or damaged.
    """
    content = _content(wanted, text.source)
    stream = stream_of(program, text.source, content, wanted)
    return _split(program, stream, wanted, seed, text)[0]


def left_to_calibrate(
    program: BaseProgram,
    stream: Stream,
    source: str,
    content: Content,
    wanted: Calibration,
    seed: int,
    measured: Sequence[Measured],
) -> Tensor:
    """The tokens of a source that nothing is measured on, in their order.

    Args:
        program: the dense model.
        stream: all tokens of the source.
        source: as the recipe names it.
        content: what it holds.
        wanted: the section of the recipe.
        seed: of the draw.
        measured: what `measured_texts` says; empty where nothing is measured.

    Raises:
        GraphPruneError: a text to measure on can't be read, or is too short.
    """
    taken = torch.zeros(len(stream.tokens), dtype=torch.bool)
    if isinstance(content, Text):
        for text in measured:
            if _same(source, content, text.source, wanted):
                taken |= _split(program, stream, wanted, seed, text)[1]
    return stream.tokens[~taken]


def _split(
    program: BaseProgram, stream: Stream, wanted: Calibration, seed: int, text: Measured
) -> tuple[Tensor, Tensor]:
    """Windows to measure on, and a bool ``[tokens]``: which tokens of the stream are in them."""
    length = wanted.length or min(MEASURED.tokens, program.default_window())
    windows = cut(stream.tokens, length, stream.begin)
    count = _count(wanted, len(windows), text.strict)
    size = text_tokens(length, stream.begin)
    if len(windows) < count:
        where = None if text.source in OWN_TEXTS else text.source
        raise too_short(len(stream.tokens), count, size, where)
    order = drawn(len(windows), count, draw_seed(wanted, seed))
    taken = torch.zeros(len(stream.tokens), dtype=torch.bool)
    taken[: len(windows) * size].view(len(windows), size)[order] = True
    return windows[order], taken


def _count(wanted: Calibration, available: int, strict: bool) -> int:
    """How many windows of a text are measured on; at least half of a short one is left."""
    most = max(1, available // 2)
    if wanted.windows is None:
        return min(MEASURED.count, most)
    # To calibrate on more is no reason to measure longer.
    count = min(wanted.windows, MEASURED.count)
    return count if strict else min(count, most)


def _long_parts(program: BaseProgram, wanted: Calibration) -> list[Measured]:
    """The files of a mixture that can spare windows; a short one is left to calibration whole."""
    found = []
    for source in dict.fromkeys(wanted.sources):
        if source in (SELF, *OWN_TEXTS):
            continue
        content = _content(wanted, source)
        if not isinstance(content, Text):
            continue
        stream = stream_of(program, source, content, wanted)
        length = wanted.length or min(MEASURED.tokens, program.default_window())
        count = min(wanted.windows or MEASURED.count, MEASURED.count)
        if len(cut(stream.tokens, length, stream.begin)) >= 2 * count:
            found.append(Measured(source))
    return found


def _content(wanted: Calibration, source: str) -> Content:
    """What a source holds, read as a part of a mixture where it is one."""
    if isinstance(wanted.data, dict):
        parts = [part for part in wanted.data.values() if part.source == source]
        if parts:
            own = {"data": source, "field": parts[0].field, "split": parts[0].split}
            wanted = wanted.model_copy(update=own)
    return read(source, wanted)


def _same(source: str, content: Text, other: str, wanted: Calibration) -> bool:
    """Whether another source holds the same text, by whatever name."""
    if source == other:
        return True
    if not (source in OWN_TEXTS or other in OWN_TEXTS) and _same_files(source, other):
        return True
    found = _content(wanted, other)
    return isinstance(found, Text) and found.text == content.text


def _same_files(first: str, second: str) -> bool:
    one, two = Path(first), Path(second)
    try:
        return one.is_file() and two.is_file() and filecmp.cmp(one, two, shallow=False)
    except OSError as error:
        raise LoadError("the text can't be read", where=second, why=error.strerror) from error
