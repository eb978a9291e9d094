"""The section ``calibration`` of a recipe: the data that scores, masks and refits look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from graphprune.options import Data, listed, parse_number

Count = Annotated[int, BeforeValidator(parse_number), Field(ge=1, lt=1 << 31)]
Pixels = Annotated[int, BeforeValidator(parse_number), Field(ge=1, le=1 << 14)]
Source = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Source, ...], BeforeValidator(listed), Field(min_length=1)]
PerChannel = Annotated[tuple[float, ...], Field(min_length=1)]


def _channels(value: object) -> object:
    return (value,) if isinstance(value, int | float) else value


class Part(Data):
    """One source of a mixture.

    Attributes:
        source: As `Calibration.data` names it.
        share: Of the windows, above 0 and at most 1; None for an equal part of what is left.
        field: See `Calibration`.
        split: See `Calibration`.
    """

    source: Source
    share: Annotated[float, BeforeValidator(parse_number), Field(gt=0, le=1)] | None = None
    field: Source | None = None
    split: Source | None = None


def _parts(value: object) -> object:
    """A mixture with short forms written out: ``self: 0.5`` and ``web: text.txt``."""
    if not isinstance(value, Mapping):
        return value
    parts: dict[object, object] = {}
    for name, part in value.items():
        if isinstance(part, str) and not _is_number(part):
            part = {"source": part}
        elif not isinstance(part, Mapping | Part):
            part = {"source": name, "share": part}
        parts[name] = part
    return parts


def _is_number(text: str) -> bool:
    try:
        parse_number(text)
    except ValueError:
        return False
    return True


FORMS = ("a source", "a mixture")


def _form(value: object) -> str:
    return FORMS[isinstance(value, Mapping)]


# Tags keep the names of pydantic's own types out of its error messages.
Sources = Annotated[
    Annotated[Source, Tag(FORMS[0])]
    | Annotated[dict[Source, Part], BeforeValidator(_parts), Field(min_length=1), Tag(FORMS[1])],
    Discriminator(_form),
]


class Calibration(Data):
    """Where calibration data comes from, and how much of it is used.

    Attributes:
        data: What is calibrated on: ``builtin`` for text of several kinds, ``help`` for CPython's
            reference text, ``self`` for windows that the model writes, a file, a directory, or
            ``module:function``; see `graphprune.calibration`. A mapping is a mixture of token
            windows: names to sources, or sources to shares. None for ``{builtin: 0.5, self: 0.5}``
            in what changes the weights of a language model, and else for the built-in text.
        general: Share of the windows that are general text (the built-in one, and what the model
            writes itself) where `data` is a text, so that the model keeps what that text lacks.
            None: 0.55 where units are chosen by obs or weights refitted, and else 0.
        text: What a language model's quality is measured on: ``builtin``, ``help`` or the path of a
            text or JSONL file, or several of them. None for `data` where that is text. One text
            alone is joined by a second of another kind; see `graphprune.calibration.measured`.
        windows: Number of samples (windows of tokens, images, recordings), and of windows of each
            text to measure on, which are 32 at most. None for as many as the work needs: 16 for
            scores, 32 to measure on, 320 for training, 128 for what else changes weights, or fewer
            where there are not so many.
        length: Tokens in a window. None for 128 in scores, 256 to measure on, and what the model
            can take, at most 2048, in what changes weights.
        draw: Whether samples are drawn at random, by the seed, or the first are taken.
        field: Name of the entry of JSON objects, or of the column of a data set, to read.
        split: Which part of a saved data set to read, where it has several.
        tokenizer: Directory of a tokenizer, for models that have none with them.
        size: Pixels of the shorter side to which images are scaled before they are cropped.
        mean: Of the channels, for values between 0 and 1: subtracted from them.
        std: Likewise; they are divided by it.
    """

    data: Sources | None = None
    general: Annotated[float, BeforeValidator(parse_number), Field(ge=0, lt=1)] | None = None
    text: Texts | None = None
    windows: Count | None = None
    length: Annotated[int, Field(ge=2, lt=1 << 31)] | None = None
    draw: Literal["random", "first"] = "random"
    field: Source | None = None
    split: Source | None = None
    tokenizer: Source | None = None
    size: Pixels | None = None
    mean: Annotated[PerChannel, BeforeValidator(_channels)] | None = None
    std: Annotated[PerChannel, BeforeValidator(_channels)] | None = None

    @model_validator(mode="after")
    def _deviations_divide(self) -> Self:
        if any(value <= 0 for value in self.std or ()):
            raise ValueError("a standard deviation is positive")
        return self

    @model_validator(mode="after")
    def _general_is_beside_a_text(self) -> Self:
        if self.general is not None and not isinstance(self.data, str):
            given = "is left out" if self.data is None else "is a mixture"
            raise ValueError(f"'general' comes beside the text that is data, and data {given}")
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if isinstance(self.data, dict):
            self.shares()
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the data, as they are named."""
        if isinstance(self.data, dict):
            return tuple(part.source for part in self.data.values())
        return () if self.data is None else (self.data,)

    @property
    def source(self) -> str | None:
        """What is calibrated on where it is no mixture; None leaves it to the work."""
        return self.data if isinstance(self.data, str) else None

    def shares(self) -> list[tuple[Part, float]]:
        """The parts of a mixture and their shares, which add up to 1.

        Raises:
            ValueError: They can't.
        """
        assert isinstance(self.data, dict)
        parts = list(self.data.values())
        open_ = sum(part.share is None for part in parts)
        left = 1 - sum(part.share or 0 for part in parts)
        if abs(left) > 1e-6 if not open_ else left <= 1e-6:
            raise ValueError(
                f"the shares of a mixture add up to {1 - left:g}; they have to make 1"
                if not open_
                else "the shares of a mixture leave nothing for the parts without one"
            )
        return [(p, left / open_ if p.share is None else p.share) for p in parts]
