"""The calibration samples of a recipe, from whatever source it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.fit import checked, count_of, enough
from graphprune.calibration.measured import measured_texts
from graphprune.calibration.mixture import (
    generated_samples,
    mixed_samples,
    token_samples,
    with_general,
)
from graphprune.calibration.own import own_samples
from graphprune.calibration.result import Samples
from graphprune.calibration.sources.amounts import WEIGHTS, Amount
from graphprune.calibration.sources.audio import load_audio
from graphprune.calibration.sources.contents import Arrays, Ids, Own, Text
from graphprune.calibration.sources.images import image_input, load_images
from graphprune.calibration.sources.read import read
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.sources.suited import suited
from graphprune.calibration.text.read import BUILTIN, OWN_TEXTS, SELF, drawn
from graphprune.calibration.tokens import Cut, tokenizer_for, window_length


def calibration_samples(
    program: BaseProgram,
    wanted: Calibration,
    seed: int,
    amount: Amount = WEIGHTS,
    tell: Callable[[str], None] = lambda stage: None,
) -> Samples:
    """The samples that a recipe asks for; see `graphprune.calibration` for the sources.

    Reading ends at 16 million characters or token ids of a text, and nothing is read for ever:
    texts are joined and cut, and iterators are stopped.

    Args:
        program: the dense model.
        wanted: the section ``calibration`` of the recipe.
        seed: of the recipe.
        amount: how much there is of what the recipe leaves open: `SCORES` or `WEIGHTS`.
        tell: told how far the model is that writes its own data.

    Raises:
        LoadError: the source is missing or damaged, holds less than was asked for, or doesn't fit
            the model. A library that is needed for it is not installed.
        RecipeError: an option means nothing for this kind of source.
        PlanError: what a function returned is no calibration data.
    """
    if isinstance(wanted.data, dict):
        return mixed_samples(program, wanted, seed, amount, tell)
    source = wanted.source or BUILTIN
    count = wanted.windows or amount.count
    if source == SELF:
        length = window_length(program, wanted, amount.length)
        return generated_samples(program, count, length, seed, tell)
    inputs = program.signature()
    content = suited(read(source, wanted), inputs, source)
    drawing = seed if wanted.draw == "random" else None
    if isinstance(content, Text | Ids):
        row = content.row if isinstance(content, Ids) else None
        length = wanted.length or row or window_length(program, wanted, amount.length)
        measured = measured_texts(program, wanted, content) if program.is_causal else ()
        joined = isinstance(content, Text) and source not in OWN_TEXTS and program.is_causal
        general = (wanted.general or 0.0) if joined else 0.0
        count = max(1, round(count * (1 - general)))
        cut = Cut(count, length, needed=count if wanted.windows else 1)
        own = token_samples(program, content, source, wanted, seed, measured, cut)
        return with_general(program, own, wanted, seed, measured, tell) if general else own
    if isinstance(content, Own):
        return own_samples(program, inputs, content, source, wanted, count)
    notes: tuple[str, ...] = ()
    data: Any
    if isinstance(content, Arrays):
        found = checked(inputs, content.arrays, source)
        available = len(next(iter(found.values())))
        order = drawn(available, enough(available, wanted, source, count), drawing)
        data = {name: value[order] for name, value in found.items()}
        kind, split = "arrays", None
    else:
        available, kind, split = len(content.files), content.kind, content.split
        if kind == "images":
            given = image_input(inputs)
            assert given is not None
            order = drawn(available, enough(available, wanted, source, count), drawing)
            files = [content.files[i] for i in order.tolist()]
            images, notes = load_images(files, program, given, wanted)
            data = checked(inputs, {given.name: images}, source)
        else:
            files = [content.files[i] for i in drawn(available, None, drawing).tolist()]
            tokenizer = tokenizer_for(program, wanted)
            pieces, notes = load_audio(files, count, program, inputs, tokenizer)
            enough(len(pieces), wanted, source, count)
            data = _stacked([checked(inputs, piece, source) for piece in pieces])
    return Samples(
        data=program.as_inputs(data),
        source=source,
        kind=kind,
        count=count_of(data),
        available=available,
        split=split,
        tokens=_token_count(data),
        seed=drawing,
        notes=notes,
    )


def _stacked(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """Samples of one size as a mapping; others stay apart."""
    if len({tuple((n, t.shape) for n, t in piece.items()) for piece in pieces}) > 1:
        return pieces
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _token_count(data: Any) -> int | None:
    """Tokens in inputs of token ids, without padding."""
    total = 0
    for one in data if isinstance(data, list) else [data]:
        for name, mask in (("input_ids", "attention_mask"),
                           ("decoder_input_ids", "decoder_attention_mask")):  # fmt: skip
            if name in one:
                total += int(one[mask].sum()) if mask in one else one[name].numel()
    return total or None
