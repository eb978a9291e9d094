"""Windows of tokens: those to calibrate on, and those that a perplexity is measured on.

Both are cut from one stream, end to end. Where they come from the same text, the perplexity has its
windows first, and calibration is cut from what is left, so that no token is in both.
"""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration import BUILTIN, OWN_TEXTS, drawn, load_tokenizer, too_short
from graphprune.errors import LoadError
from graphprune.inputs import tokenizer_of
from graphprune.paths import usable
from graphprune.program import BaseProgram, Program
from graphprune.recipe_calibration import Calibration
from graphprune.samples.contents import Content, Ids, Text
from graphprune.samples.generated import SELF
from graphprune.samples.sources import read
from graphprune.streaming.data import default_window
from graphprune.tokenising import tokenised

EVALUATED = 16
"""Windows that a perplexity is measured on, and the tokens of each, where a recipe doesn't say."""

SHORT = 128


@dataclass(frozen=True)
class Windows:
    """Token windows, and where they are from.

    Attributes:
        tokens: int64 ``[count, length]``.
        available: how many windows there were to take them from.
        in_domain: whether the perplexity is measured on the same text.
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


def evaluated_source(wanted: Calibration, content: Content | None = None) -> str:
    """The source of the text that a perplexity is measured on.

    Args:
        wanted: the section of the recipe.
        content: what `Calibration.data` holds, if it has been read.

    Raises:
        GraphPruneError: see `graphprune.samples.sources.read`.
    """
    if wanted.text is not None:
        return wanted.text
    if not isinstance(wanted.data, str) or wanted.data in (BUILTIN, SELF):
        return BUILTIN
    content = read(wanted.data, wanted) if content is None else content
    return wanted.data if isinstance(content, Text) else BUILTIN


def evaluation_windows(program: BaseProgram, wanted: Calibration, seed: int) -> Tensor:
    """The windows that a language model's perplexity is measured on.

    They don't depend on what else the recipe asks for.

    Args:
        program: the dense model.
        wanted: the section of the recipe.
        seed: of the draw.

    Returns:
        int64 ``[count, length]``.

    Raises:
        LoadError: there is no tokenizer, or the text is too short or damaged.
    """
    source = evaluated_source(wanted)
    stream = _stream(program, source, read(source, wanted), wanted)
    return _parted(program, source, stream, wanted, seed)[0]


def calibration_windows(
    program: BaseProgram,
    source: str,
    content: Text | Ids,
    wanted: Calibration,
    seed: int,
    evaluated: str | None,
    cut: Cut,
) -> Windows:
    """The windows to calibrate on.

    Args:
        program: the dense model.
        source: where the content is from, for messages.
        content: text, or token ids.
        wanted: the section of the recipe.
        seed: of the draw.
        evaluated: the text that a perplexity is measured on; None where none is.
        cut: how many windows, and of how many tokens.

    Raises:
        LoadError: there is no tokenizer, or the text is too short.
    """
    stream = _stream(program, source, content, wanted)
    whole = len(stream)
    same = evaluated is not None and isinstance(content, Text) and _same(evaluated, source)
    if same:
        stream = _parted(program, source, stream, wanted, seed)[1]
    available = len(stream) // cut.length
    if available < cut.needed:
        raise too_short(len(stream), cut.needed, cut.length, source, whole - len(stream))
    windows = stream[: available * cut.length].view(available, cut.length)
    order = drawn(available, cut.count, _seed(wanted, seed))
    return Windows(windows[order], available, same)


def window_length(program: BaseProgram, wanted: Calibration, length: int | None) -> int:
    """The tokens in each window: as the recipe says, or what the work needs and the model takes.

    Args:
        program: the dense model.
        wanted: the section of the recipe.
        length: what the work needs; None for `default_window`.
    """
    if wanted.length is not None:
        return wanted.length
    size = default_window(program) if length is None else min(length, default_window(program))
    return min(size, _limit(program, wanted))


def tokenizer_for(program: BaseProgram, wanted: Calibration) -> Any | None:
    """The tokenizer that the recipe names, or that of the checkpoint; None if there is none.

    Raises:
        LoadError: the directory has none, or it can't be opened.
    """
    if wanted.tokenizer is None:
        return tokenizer_of(program)
    source = program.source if isinstance(program, Program) else None
    trust = source is not None and source.trust
    found = load_tokenizer(usable(wanted.tokenizer), trust=trust)
    if found is None:
        raise LoadError("the directory has no tokenizer", where=wanted.tokenizer)
    return found


def _stream(program: BaseProgram, source: str, content: Content, wanted: Calibration) -> Tensor:
    """All tokens of a source, end to end."""
    if isinstance(content, Ids):
        return content.stream
    if not isinstance(content, Text):
        raise LoadError(
            "a perplexity is measured on text", where=source, hint="give a text file as text"
        )
    tokenizer = tokenizer_for(program, wanted)
    if tokenizer is None:
        path = program.source.path if isinstance(program, Program) and program.source else None
        raise LoadError(
            "text needs a tokenizer, and the model has none",
            where=str(path) if path else None,
            hint="save the tokenizer with the checkpoint, name its directory with "
            "calibration.tokenizer, or give token ids",
        )
    return tokenised(tokenizer, content.text)


def _parted(
    program: BaseProgram, source: str, stream: Tensor, wanted: Calibration, seed: int
) -> tuple[Tensor, Tensor]:
    """Windows to measure a perplexity on, and all other tokens in their order."""
    length = wanted.length or min(SHORT, default_window(program))
    available = len(stream) // length
    # By default at least half of a short text is left for calibration.
    count = wanted.windows or min(EVALUATED, max(1, available // 2))
    if available < count:
        raise too_short(len(stream), count, length, None if source in OWN_TEXTS else source)
    order = drawn(available, count, _seed(wanted, seed))
    taken = torch.zeros(len(stream), dtype=torch.bool)
    taken[: available * length].view(available, length)[order] = True
    return stream[: available * length].view(available, length)[order], stream[~taken]


def _seed(wanted: Calibration, seed: int) -> int | None:
    return seed if wanted.draw == "random" else None


def _same(first: str, second: str) -> bool:
    """Whether two sources hold the same text."""
    if first == second:
        return True
    if first in OWN_TEXTS or second in OWN_TEXTS:
        return False
    try:
        one, two = Path(first), Path(second)
        if one.samefile(two):
            return True
        return one.is_file() and two.is_file() and filecmp.cmp(one, two, shallow=False)
    except OSError:
        return False


def _limit(program: BaseProgram, wanted: Calibration) -> int:
    """What a tokenizer says that its model can take, where the model itself doesn't say."""
    if isinstance(program, Program) or wanted.tokenizer is None:
        return default_window(program)
    longest = getattr(tokenizer_for(program, wanted), "model_max_length", None)
    window = default_window(program)
    return min(window, longest) if isinstance(longest, int) and longest > 1 else window
