"""The section ``calibration`` of a recipe: the data that scores, masks and refits look at."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from graphprune.recipe_values import Data, parse_number

Count = Annotated[int, BeforeValidator(parse_number), Field(ge=1, lt=1 << 31)]
Pixels = Annotated[int, BeforeValidator(parse_number), Field(ge=1, le=1 << 14)]
Source = Annotated[str, Field(min_length=1)]
PerChannel = Annotated[tuple[float, ...], Field(min_length=1)]


def _channels(value: object) -> object:
    return (value,) if isinstance(value, int | float) else value


class Calibration(Data):
    """Where calibration data comes from, and how much of it is used.

    Attributes:
        data: What is calibrated on: ``builtin`` text, a file, a directory, or
            ``module:function``; see `graphprune.samples`. None for `text`, or the built-in text.
        text: What a language model's perplexity is measured on: ``builtin`` (CPython's English
            reference text) or the path of a text or JSONL file. None for `data` where that is text.
        windows: Number of samples (windows of tokens, images, recordings), and of windows to
            measure perplexity on. None for as many as the work needs: 16 for scores and for the
            perplexity, 128 for what changes weights, or fewer where there are not so many.
        length: Tokens in a window. None for 128 in scores and in the perplexity, and for what the
            model can take, at most 2048, in what changes weights.
        draw: Whether samples are drawn at random, by the seed, or the first are taken.
        field: Name of the entry of JSON objects, or of the column of a data set, to read.
        split: Which part of a saved data set to read, where it has several.
        tokenizer: Directory of a tokenizer, for models that have none with them.
        size: Pixels of the shorter side to which images are scaled before they are cropped.
        mean: Of the channels, for values between 0 and 1: subtracted from them.
        std: Likewise; they are divided by it.
    """

    data: Source | None = None
    text: Source | None = None
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
