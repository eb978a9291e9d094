"""Finding the operator that made the first NaN or infinity, and saying so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.streaming.core.cache import tensors_in
from graphprune.streaming.core.sites import Site


def kind_of(value: Any) -> str:
    """What a value holds that isn't finite: "NaN", "infinity", or "" for neither."""
    kind = ""
    for x in tensors_in(value):
        if bool(torch.isnan(x).any()):
            return "NaN"
        if bool(torch.isinf(x).any()):
            kind = "infinity"
    return kind


def find_source(
    name: str,
    bad: Mapping[str, str],
    reads: Callable[[str], Iterable[str]],
    constant: Collection[str],
) -> str:
    """Go back from a value that isn't finite to the first that isn't.

    Args:
        name: of the value.
        bad: values that aren't finite, to `kind_of` them.
        reads: gives the operands of the operator behind a value.
        constant: values of which infinity is as it should be: masks.
    """
    while True:
        operands = list(reads(name))
        worse = [n for n in operands if bad.get(n) == "NaN"]
        worse += [n for n in operands if bad.get(n) == "infinity" and n not in constant]
        if not worse:
            return name
        name = worse[0]


def not_finite(
    site: Site,
    batch: Batch,
    x: Any,
    source: tuple[str, str | None],
    operator: str | None,
    broken: str | None,
    owner: str,
) -> PlanError:
    """The error for an activation with NaN or infinity.

    Args:
        site: what reads the activation.
        batch: where it occurs.
        x: the activation.
        source: name of the value that it comes from, and `kind_of` that, as far as it is known.
        operator: where that is computed, in words; None for an input of the model.
        broken: a weight of the operator that isn't finite; None where there is none.
        owner: what stores the weights, in a word.
    """
    name, kind = source[0], source[1] or "NaN or infinity"
    if broken is not None:
        why, hint = f"the weight {broken} holds NaN or infinity", f"repair the {owner}"
    elif operator is None:
        why, hint = f"it holds {kind}", "leave this sample out, or correct it"
    else:
        why = f"its operands are finite, the result holds {kind}"
        hint = "leave this sample out, or compute in a wider dtype"
    return PlanError(
        f"an activation that {site.parameter} reads is not finite",
        where=f"{operator or f'the input {name}'}, {_samples(batch, x)}",
        why=why,
        hint=hint,
    )


def _samples(batch: Batch, x: Any) -> str:
    """The sample, where the first dimension of the activation counts samples."""
    if batch.count == 1:
        return f"sample {batch.first}"
    if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == batch.count:
        bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten()
        if len(bad):
            return f"sample {batch.first + int(bad[0])}"
    return f"samples {batch.first} to {batch.first + batch.count - 1}"
