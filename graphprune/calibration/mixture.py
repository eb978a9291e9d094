"""Token windows of one source, of the model itself, or of several sources in given shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.signature import token_input
from graphprune.calibration.dense import check_dense
from graphprune.calibration.fit import check_ids, checked, with_all_inputs
from graphprune.calibration.general import general_parts
from graphprune.calibration.generated import generate_windows
from graphprune.calibration.measured import Measured, left_to_calibrate, measured_texts
from graphprune.calibration.result import Samples
from graphprune.calibration.sources.amounts import Amount
from graphprune.calibration.sources.contents import Ids, Text
from graphprune.calibration.sources.read import read
from graphprune.calibration.sources.section import Calibration, Part
from graphprune.calibration.sources.suited import suited
from graphprune.calibration.text.order import alternate
from graphprune.calibration.text.read import BUILTIN, SELF
from graphprune.calibration.tokens import (
    Cut,
    calibration_windows,
    draw_seed,
    stream_of,
    window_length,
)
from graphprune.errors import CalibrationError, LoadError, RecipeError

_IN_DOMAIN = (
    "calibrated and measured on the same text, {} (other windows of it): how the model does "
    "elsewhere is what the other texts say"
)


_FOREIGN = (
    "the dense model makes no sense of the built-in text, which is English: no general text beside "
    "yours but what the model writes itself"
)


def token_samples(
    program: BaseProgram,
    content: Text | Ids,
    source: str,
    wanted: Calibration,
    seed: int,
    measured: Sequence[Measured],
    cut: Cut,
) -> Samples:
    """Windows of a text or of token ids, with whatever else the model reads.

    Args:
        program: the dense model; it reads tokens.
        content: what the source holds.
        source: for messages.
        wanted: the section of the recipe.
        seed: of the draw.
        measured: the texts that the model is measured on, whose windows are left out.
        cut: how many windows, and of how many tokens.

    Raises:
        LoadError: the source has not enough tokens, or they are another model's.
    """
    inputs = program.signature()
    given = token_input(inputs)
    assert given is not None
    if isinstance(content, Ids):
        check_ids(content.stream, given, source)
    stream = stream_of(program, source, content, wanted)
    left = left_to_calibrate(program, stream, source, content, wanted, seed, measured)
    found = calibration_windows(stream, left, source, cut, draw_seed(wanted, seed))
    check_ids(found.tokens, given, source)
    data = with_all_inputs(program, inputs, found.tokens)
    data = checked(inputs, data, source) if isinstance(data, Mapping) else data.to(given.dtype)
    return Samples(
        data=program.as_inputs(data),
        source=source,
        kind="text" if isinstance(content, Text) else "token ids",
        count=len(found.tokens),
        available=found.available,
        length=found.tokens.shape[1],
        tokens=found.tokens.numel(),
        split=content.split,
        seed=seed if wanted.draw == "random" else None,
        in_domain=found.in_domain,
        notes=(_IN_DOMAIN.format(source),) if found.in_domain else (),
    )


def generated_samples(
    program: BaseProgram, count: int, length: int, seed: int, tell: Callable[[str], None]
) -> Samples:
    """Windows that the model writes itself; see `generate_windows`."""
    data = generate_windows(program, count, length, seed, tell)
    return Samples(
        data=data,
        source=SELF,
        kind="token ids",
        count=count,
        length=length,
        tokens=data.numel(),
        seed=seed,
        own=True,
    )


def mixed_samples(
    program: BaseProgram,
    wanted: Calibration,
    seed: int,
    amount: Amount,
    tell: Callable[[str], None],
) -> Samples:
    """Token windows of one length from several sources, in the proportions of their shares.

    A source that is too short for its share gives what it has, and a note where it was asked for.

    Args:
        program: the dense model.
        wanted: the section of the recipe; its data is a mixture.
        seed: of the draws, and of the order.
        amount: how much there is of what the recipe leaves open.
        tell: told how far the model is that writes its own windows.

    Raises:
        LoadError: a source can't be read, has no tokens, or the model reads more than tokens.
        RecipeError: there are fewer windows than sources, or an option means nothing for one.
    """
    if not program.is_causal:
        raise LoadError(
            "only what a model reads as token windows alone can be mixed",
            where="calibration.data",
            hint="give one source of the kind that the model reads",
        )
    shares = wanted.shares()
    measured = measured_texts(program, wanted)
    total = wanted.windows or amount.count
    length = window_length(program, wanted, amount.length)
    found = []
    for (part, share), count in zip(shares, apportion([s for _, s in shares], total), strict=True):
        if not count:
            raise RecipeError(
                "there are fewer windows than the mixture needs",
                where="calibration.windows",
                why=f"{100 * share:g} % of {total} is less than one, for {part.source}",
                hint="ask for more windows, or give the source a larger share",
            )
        if part.source == SELF:
            found.append(generated_samples(program, count, length, seed, tell))
            continue
        found.append(_part(program, part, wanted, seed, measured, Cut(count, length)))
    assert isinstance(wanted.data, dict)
    return _joined(found, length, seed, tuple(wanted.data))


def with_general(
    program: BaseProgram,
    own: Samples,
    wanted: Calibration,
    seed: int,
    measured: Sequence[Measured],
    tell: Callable[[str], None],
) -> Samples:
    """Windows of a text and of general text beside it; see `general_parts`.

    Args:
        program: the dense model.
        own: the windows of the text.
        wanted: the section of the recipe; `Calibration.general` is the share of general text.
        seed: of the draws, and of the order.
        measured: what is measured on, which is left out.
        tell: told how far the model is that writes its own windows.
    """
    assert own.length is not None
    assert wanted.general is not None
    parts = general_parts(program)
    total = round(own.count * wanted.general / (1 - wanted.general))
    found, notes = [own], own.notes
    builtin = parts.pop(BUILTIN)
    count = total - total // 2 if parts else total
    if count:
        general = _part(program, builtin, wanted, seed, measured, Cut(count, own.length))
        try:
            check_dense(program, general.data)
            found.append(general)
            total -= general.count
        except CalibrationError:
            notes += (_FOREIGN,)
    if parts and total:
        found.append(generated_samples(program, total, own.length, seed, tell))
    return replace(_joined(found, own.length, seed), given=own.data, notes=notes)


def _joined(found: Sequence[Samples], length: int, seed: int, names: Sequence[str] = ()) -> Samples:
    """Windows of several sources as one, in an order in which the sources take turns.

    Those of sources with `names` can be told apart by them.
    """
    order = alternate([s.count for s in found], seed)
    owners = [owner for owner, s in enumerate(found) for _ in range(s.count)]
    return Samples(
        data=torch.cat([s.data for s in found])[order],
        source=" + ".join(f"{s.count} of {_found_again(s.source)}" for s in found),
        kind="token ids",
        count=len(order),
        length=length,
        tokens=len(order) * length,
        seed=seed,
        in_domain=any(s.in_domain for s in found),
        notes=tuple(dict.fromkeys(note for s in found for note in s.notes)),
        domains={
            name: tuple(i for i, number in enumerate(order) if owners[int(number)] == owner)
            for owner, name in enumerate(names)
        },
    )


def _part(
    program: BaseProgram,
    part: Part,
    wanted: Calibration,
    seed: int,
    measured: Sequence[Measured],
    cut: Cut,
) -> Samples:
    """One source of a mixture."""
    source = part.source
    own = {"data": source, "field": part.field, "split": part.split}
    content = read(source, wanted.model_copy(update=own))
    content = suited(content, program.signature(), source)
    if not isinstance(content, Text | Ids):
        raise LoadError("only text and token ids can be mixed", where=source)
    found = token_samples(program, content, source, wanted, seed, measured, cut)
    if found.count == cut.count or part.share is None:
        return found
    note = f"{source} has {found.count} windows, and its share is {cut.count}"
    return replace(found, notes=(*found.notes, note))


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportions of some shares, by largest remainders.

    Args:
        shares: they add up to 1.
        total: what the numbers add up to.
    """
    exact = [share * total for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _found_again(source: str) -> str:
    """A file's name from any directory; other sources as they are."""
    return os.path.abspath(source) if os.path.exists(source) else source
