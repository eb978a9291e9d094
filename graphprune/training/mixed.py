"""Domains of a recipe's data, whose shares follow their losses while a model trains."""

from __future__ import annotations

from typing import Any

import torch

from graphprune.calibration.result import Samples
from graphprune.errors import LoadError
from graphprune.ir.torch.program import Program
from graphprune.training.domains.options import DENSE, Domains
from graphprune.training.domains.reference import read_reference
from graphprune.training.dynamic import DynamicBatches


def check_domains(options: Domains | None) -> None:
    """Read reference losses from their file, before anything else is.

    Raises:
        TrainingError: they can't be read.
    """
    if options is not None and options.reference != DENSE:
        read_reference(options.reference)


def domains_of(
    options: Domains | None, samples: Samples, dense: Program, size: int
) -> tuple[Any, tuple[DynamicBatches, ...]]:
    """What a step trains on, and what deals its batches to domains.

    Args:
        options: of the step; None for all samples as they are.
        samples: a mixture, whose parts are the domains.
        dense: the dense model, whose losses may be references.
        size: parameters of the model that comes out.

    Raises:
        LoadError: the data is no mixture, or a part of it has too few windows.
        TrainingError: names of domains differ, or a reference is missing.
    """
    if options is None:
        return samples.data, ()
    windows = samples.windows
    if not samples.domains or windows is None:
        raise LoadError(
            "the data has no domains",
            where="calibration.data",
            why="it is one source",
            hint="name several: calibration: {data: {wiki: wiki.txt, code: code.txt}}",
        )
    train, held_out = {}, {}
    for name, numbers in samples.domains.items():
        count = max(1, round(options.held_out * len(numbers)))
        if count >= len(numbers):
            raise LoadError(
                f"domain {name} has too few windows",
                where="calibration.data",
                why=f"{len(numbers)}, of which {count} are held out",
                hint="ask for more windows, or give it a larger share",
            )
        own = windows[torch.tensor(numbers)]
        train[name], held_out[name] = own[:-count], own[-count:]
    mixed = DynamicBatches(
        train,
        held_out,
        reference=dense if options.reference == DENSE else options.reference,
        shares=options.shares,
        every=options.every,
        rule=options.rule,
        step_size=options.step_size,
        floor=options.floor,
        exhausted=options.exhausted,
        size=size,
    )
    return mixed.data, (mixed,)


def figures_of(dealt: tuple[DynamicBatches, ...]) -> dict[str, Any]:
    """What the report has of domains."""
    if not dealt:
        return {}
    (mixed,) = dealt
    history = [
        {"step": m.step, "losses": dict(m.losses), "shares": dict(m.shares)} for m in mixed.history
    ]
    return {"domains": {"reference": dict(mixed.aims), "history": history}}


def notes_of(dealt: tuple[DynamicBatches, ...]) -> tuple[str, ...]:
    """What there is to say of domains."""
    found = []
    for mixed in dealt:
        if mixed.unmeasured:
            names = ", ".join(mixed.unmeasured)
            found.append(f"the loss of {names} was no number at times: its share stayed then")
        found += [
            f"the windows of {name} were seen {often:.2g} times"
            for name, often in mixed.repeated.items()
        ]
    return tuple(found)
