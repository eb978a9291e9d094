"""Windows of tokens to calibrate on, cut from one stream, end to end.

What a model is measured on is taken first (see `graphprune.calibration.measured`), and calibration
is cut from what is left, so that no token is in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.sources.contents import Content, Ids, Text
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.text.read import (
    BUILTIN,
    drawn,
    load_tokenizer,
    read_text,
    too_short,
    windows,
)
from graphprune.calibration.text.tokenising import begin_token, text_tokens, tokenised
from graphprune.calibration.text.tokenising import cut as cut_windows
from graphprune.errors import LoadError
from graphprune.files.paths import usable
from graphprune.ir.torch.program import Program


@dataclass(frozen=True)
class Stream:
    """All tokens of a source.

    Attributes:
        tokens: int64 ``[tokens]``, end to end.
        begin: the token that each window starts with, as the tokenizer has it; None for none, and
            for token ids, which are taken as they are.
    """

    tokens: Tensor
    begin: int | None = None


@dataclass(frozen=True)
class Windows:
    """Token windows, and where they are from.

    Attributes:
        tokens: int64 ``[count, length]``.
        available: how many windows there were to take them from.
        in_domain: whether something is measured on the same text.
    """

    tokens: Tensor
    available: int
    in_domain: bool


@dataclass(frozen=True)
class Cut:
    """How many windows are cut of a stream of tokens.

    Attributes:
        count: how many; fewer if there are not so many.
        length: tokens in each.
        needed: the number without which it is an error.
    """

    count: int
    length: int
    needed: int = 1


def calibration_windows(
    stream: Stream, left: Tensor, source: str, cut: Cut, seed: int | None
) -> Windows:
    """The windows to calibrate on.

    Args:
        stream: all tokens of the source.
        left: those that nothing is measured on.
        source: for messages.
        cut: how many windows, and of how many tokens.
        seed: of the draw; None for the first windows.

    Raises:
        LoadError: there are not enough tokens.
    """
    windows = cut_windows(left, cut.length, stream.begin)
    if len(windows) < cut.needed:
        size = text_tokens(cut.length, stream.begin)
        raise too_short(len(left), cut.needed, size, source, len(stream.tokens) - len(left))
    order = drawn(len(windows), cut.count, seed)
    return Windows(windows[order], len(windows), len(left) < len(stream.tokens))


def window_length(program: BaseProgram, wanted: Calibration, length: int | None) -> int:
    """The tokens in each window: as the recipe says, or what the work needs and the model takes.

    Args:
        program: the dense model.
        wanted: the section of the recipe.
        length: what the work needs; None for `BaseProgram.default_window`.
    """
    if wanted.length is not None:
        return wanted.length
    size = program.default_window() if length is None else min(length, program.default_window())
    return min(size, _limit(program, wanted))


def tokenizer_for(program: BaseProgram, wanted: Calibration) -> Any | None:
    """The tokenizer that the recipe names, or that of the checkpoint; None if there is none.

    Raises:
        LoadError: the directory has none, or it can't be opened.
    """
    if wanted.tokenizer is None:
        return tokenizer_of(program)
    source = program.source
    trust = source is not None and source.trust
    found = load_tokenizer(usable(wanted.tokenizer), trust=trust)
    if found is None:
        raise LoadError("the directory has no tokenizer", where=wanted.tokenizer)
    return found


def stream_of(program: BaseProgram, source: str, content: Content, wanted: Calibration) -> Stream:
    """All tokens of a source, end to end.

    Args:
        program: the dense model.
        source: for messages.
        content: what the source holds.
        wanted: the section of the recipe.

    Raises:
        LoadError: it holds no text or token ids, or there is no tokenizer for its text.
    """
    if isinstance(content, Ids):
        return Stream(content.stream)
    if not isinstance(content, Text):
        raise LoadError(
            "a perplexity is measured on text", where=source, hint="give a text file as text"
        )
    tokenizer = tokenizer_for(program, wanted)
    if tokenizer is None:
        path = program.source.path if program.source else None
        raise LoadError(
            "text needs a tokenizer, and the model has none",
            where=str(path) if path else None,
            hint="save the tokenizer with the checkpoint, name its directory with "
            "calibration.tokenizer, or give token ids",
        )
    return Stream(tokenised(tokenizer, content.text), begin_token(tokenizer))


def draw_seed(wanted: Calibration, seed: int) -> int | None:
    """The seed of a draw; None where the first windows are taken."""
    return seed if wanted.draw == "random" else None


def _limit(program: BaseProgram, wanted: Calibration) -> int:
    """What a tokenizer says that its model can take, where an ONNX file doesn't say."""
    if program.format != "onnx" or wanted.tokenizer is None:
        return program.default_window()
    longest = getattr(tokenizer_for(program, wanted), "model_max_length", None)
    window = program.default_window()
    return min(window, longest) if isinstance(longest, int) and longest > 1 else window


def text_windows(
    program: Program,
    source: str | Path = BUILTIN,
    count: int = 128,
    length: int | None = None,
    seed: int | None = 0,
) -> Tensor:
    """Token windows of a text, by the tokenizer of the program's checkpoint.

    Args:
        program: the program.
        source: see `graphprune.calibration.text.read.read_text`.
        count: number of windows.
        length: tokens in each; None for `BaseProgram.default_window`.
        seed: see `graphprune.calibration.text.read.windows`.

    Returns:
        int64 ``[count, length]``.

    Raises:
        LoadError: there is no tokenizer, or the text is too short.
    """
    tokenizer = tokenizer_of(program)
    if tokenizer is None:
        raise LoadError(
            "text needs a tokenizer, and the model has none",
            hint="save the tokenizer with the checkpoint, or give token windows",
        )
    length = program.default_window() if length is None else length
    return windows(tokenizer, read_text(source), length=length, count=count, seed=seed)


def tokenizer_of(program: BaseProgram) -> Any | None:
    """The tokenizer of the checkpoint behind a program, if there is one.

    Raises:
        LoadError: it can't be opened.
    """
    source = program.source
    if source is None or source.path is None:
        return None
    return load_tokenizer(source.path, trust=source.trust)
