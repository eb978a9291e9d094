"""How far the residual stream turns between two places of a model, over calibration tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.axes import atoms
from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.passes.shared.forward import Tokens, show_all
from graphprune.ranks.group import current

Pair: TypeAlias = tuple[str, str]


def mean_over_tokens(
    program: Program,
    pairs: Iterable[Pair],
    features: Mapping[str, int],
    samples: Sequence[Batch],
    measure: Callable[[Tensor], Tensor],
) -> dict[Pair, float]:
    """The mean over all tokens of a function of the cosine between two values.

    All pairs are measured in one pass; a value is held until the last of its pairs.

    Args:
        program: the program.
        pairs: names of two values of one shape, the earlier one first.
        features: for each value the dimension that is summed over, counted from the end.
        samples: calibration samples; padding doesn't count.
        measure: takes cosines, float64 ``[tokens]``, and gives what is to be averaged.

    Returns:
        Pair to mean. Products are summed in float64.

    Raises:
        PlanError: a value isn't finite, or there is no token that counts.
    """
    ending: dict[str, list[str]] = defaultdict(list)
    for first, last in dict.fromkeys(pairs):
        ending[last].append(first)
    uses = Counter(first for firsts in ending.values() for first in firsts)
    tokens = Tokens(program)
    total: dict[Pair, float] = defaultdict(float)
    count: Counter[Pair] = Counter()
    held: dict[str, Tensor] = {}
    left: Counter[str] = Counter(uses)

    def see(name: str, value: Tensor, batch: Batch) -> None:
        rows = tokens.rows(name, value, features[name], batch.valid).double()
        if not bool(rows.isfinite().all()):
            raise PlanError(
                "the residual stream is not finite",
                where=f"value {name}, samples {batch.first} to {batch.first + batch.count - 1}",
                hint="check the calibration data and the checkpoint for NaN",
            )
        unit = torch.nn.functional.normalize(rows, dim=-1, eps=1e-30)
        for first in ending.get(name, ()):
            cosine = torch.einsum("th,th->t", held[first], unit)
            total[first, name] += float(measure(cosine).sum())
            count[first, name] += len(cosine)
            left[first] -= 1
            if not left[first]:
                del held[first]
        if left[name]:
            held[name] = unit

    def again() -> None:
        held.clear()
        left.update(uses - left)

    show_all(program, {*uses, *ending}, samples, see, again)
    found = [(first, last) for last, firsts in ending.items() for first in firsts]
    own = torch.tensor([[total[pair], count[pair]] for pair in found], dtype=torch.float64)
    sums = current().add(own).tolist()
    if any(not tokens for _, tokens in sums):
        raise PlanError("there is no token in the calibration data that is no padding")
    return {pair: angle / tokens for pair, (angle, tokens) in zip(found, sums, strict=True)}


def feature_dims(program: BaseProgram, structures: Iterable[Structure]) -> dict[str, int]:
    """For the entries and exits of blocks, the dimension that holds a token's features.

    It is the dimension whose axis most of the block's parameters have: of ``[batch, length,
    hidden]`` the last, of an image's ``[batch, channels, height, width]`` the second. Of equal
    ones the last.

    Returns:
        Value to dimension, counted from the end.
    """
    found: dict[str, int] = {}
    for structure in structures:
        for block in structure.blocks:
            own = Counter(
                atom
                for p in block.parameters
                if p in program.trainable
                for d in program.typing.parameters[p]
                for atom in set(atoms(d))
            )
            for value in (block.entry, block.exit):
                dims = program.typing.values[value][0]
                weights = [max((own[a] for a in atoms(d)), default=0) for d in dims]
                best = max(range(len(dims)), key=lambda i: (weights[i], i))
                found.setdefault(value, best - len(dims))
    return found


def only_blocks(structures: Sequence[Structure], score: str) -> list[Structure]:
    """`structures`, if all of them are stacks of layers or branches.

    Raises:
        PlanError: one isn't.
    """
    for structure in structures:
        if not structure.blocks:
            raise PlanError(
                f"score {score} is for layers and their branches",
                where=f"structure {structure.name}, role {structure.role}",
                hint="select them in a run of their own, with remove: {layers: ...}",
            )
    return list(structures)
