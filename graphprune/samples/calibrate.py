"""The calibration samples of a recipe, from whatever source it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from graphprune.calibration import BUILTIN, drawn
from graphprune.errors import LoadError
from graphprune.inputs import Input, inputs_of, token_input
from graphprune.program import BaseProgram
from graphprune.recipe_calibration import Calibration
from graphprune.samples.arrays import ids_of
from graphprune.samples.audio import audio_input, load_audio
from graphprune.samples.contents import Arrays, Content, Files, Ids, Own, Text
from graphprune.samples.fit import check_ids, checked, with_all_inputs
from graphprune.samples.handed import count_of, enough, for_graph
from graphprune.samples.images import image_input, load_images
from graphprune.samples.own import own_samples
from graphprune.samples.result import WEIGHTS, Amount, Samples
from graphprune.samples.sources import read
from graphprune.samples.tokens import calibration_windows, tokenizer_for

_IN_DOMAIN = (
    "calibrated and measured on the same text (other windows of it): give text and data apart for "
    "a perplexity that says how the model does elsewhere"
)


def calibration_samples(
    program: BaseProgram, wanted: Calibration, seed: int, amount: Amount = WEIGHTS
) -> Samples:
    """The samples that a recipe asks for; see `graphprune.samples` for the sources.

    Reading ends at 16 million characters or token ids of a text, and nothing is read for ever:
    texts are joined and cut, and iterators are stopped.

    Args:
        program: the dense model.
        wanted: the section ``calibration`` of the recipe.
        seed: of the recipe.
        amount: how much there is of what the recipe leaves open: `SCORES` or `WEIGHTS`.

    Raises:
        LoadError: the source is missing or damaged, holds less than was asked for, or doesn't fit
            the model. A library that is needed for it is not installed.
        RecipeError: an option means nothing for this kind of source.
        PlanError: what a function returned is no calibration data.
    """
    source = wanted.data or wanted.text or BUILTIN
    inputs = inputs_of(program)
    content = _for(read(source, wanted), inputs, source)
    count = wanted.windows or amount.count
    drawing = seed if wanted.draw == "random" else None
    if isinstance(content, Text | Ids):
        return _tokens(program, inputs, content, source, wanted, seed, amount)
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
        data=for_graph(program, data),
        source=source,
        kind=kind,
        count=count_of(data),
        available=available,
        split=split,
        tokens=_token_count(data),
        seed=drawing,
        notes=notes,
    )


def _for(content: Content, inputs: Sequence[Input], source: str) -> Content:
    """A content of the kind that a model reads: arrays may be token ids, bytes images or sound."""
    tokens, names = token_input(inputs), {i.name for i in inputs}
    if isinstance(content, Text | Ids) and tokens is None:
        raise _other_kind(source, "token ids", inputs)
    if isinstance(content, Files):
        kind: Literal["images", "audio"]
        if content.kind == "either":
            kind = "audio" if audio_input(inputs) is not None else "images"
        else:
            kind = content.kind
        suited = image_input(inputs) if kind == "images" else audio_input(inputs)
        if suited is None:
            raise _other_kind(source, kind, inputs)
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


def _tokens(
    program: BaseProgram,
    inputs: Sequence[Input],
    content: Text | Ids,
    source: str,
    wanted: Calibration,
    seed: int,
    amount: Amount,
) -> Samples:
    given = token_input(inputs)
    assert given is not None
    if isinstance(content, Ids):
        check_ids(content.stream, given, source)
    found = calibration_windows(program, source, content, wanted, seed, amount.count, amount.length)
    check_ids(found.tokens, given, source)
    data = with_all_inputs(program, inputs, found.tokens)
    data = checked(inputs, data, source) if isinstance(data, Mapping) else data.to(given.dtype)
    return Samples(
        data=for_graph(program, data),
        source=source,
        kind="text" if isinstance(content, Text) else "token ids",
        count=len(found.tokens),
        available=found.available,
        length=found.tokens.shape[1],
        tokens=found.tokens.numel(),
        split=content.split,
        seed=seed if wanted.draw == "random" else None,
        in_domain=found.in_domain,
        notes=(_IN_DOMAIN,) if found.in_domain else (),
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


def _other_kind(source: str, kind: str, inputs: Sequence[Input]) -> LoadError:
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
