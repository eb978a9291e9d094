"""Which weights go next: masks with exact counts, that only grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.solvers.pattern import lowest
from graphprune.training.schedule.options import GradualPruning
from graphprune.training.schedule.targets import Target


def scores_of(name: str, weight: Tensor, options: GradualPruning) -> Tensor:
    """How much each element of a weight matters.

    Raises:
        TrainingError: a score is no number, or scores have another shape than the weight.
    """
    if options.score == "magnitude":
        found = weight.detach().abs()
    else:
        assert callable(options.score)
        found = options.score(name, weight.detach())
    if found.shape != weight.shape:
        raise TrainingError(
            "scores don't fit their weight",
            where=name,
            why=f"{tuple(found.shape)}, where {tuple(weight.shape)} is needed",
        )
    if not torch.isfinite(found).all():
        raise TrainingError(
            "a score is NaN or infinite",
            where=name,
            why="training has diverged" if options.score == "magnitude" else None,
            hint="go back to an earlier checkpoint, and lower the learning rate",
        )
    return found if found.dtype == torch.float64 else found.float()


def next_masks(
    targets: Sequence[Target],
    scores: Mapping[str, Tensor],
    removed: Mapping[str, Tensor],
    sparsity: float,
    options: GradualPruning,
) -> dict[str, Tensor]:
    """What is removed at a sparsity: all that was before, and the lowest of the rest.

    Of equal scores the element of lower index goes, in the order of parameters, so that every
    process that has the same weights makes the same masks.

    Args:
        targets: parameters that compete.
        scores: of each by name, in its shape.
        removed: what has gone already, by name, True where a zero is.
        sparsity: at most that of the end.
        options: the pattern, if there is one.

    Returns:
        Name to bool of its shape, True where a zero is.
    """
    open_ = _joined(
        {t.name: _candidates(t, scores[t.name], removed[t.name], options) for t in targets}
    )
    value, gone = _joined(scores)[open_], _joined(removed)[open_]
    share = sparsity if options.nm is None else sparsity / options.target
    chosen = torch.zeros_like(open_)
    count = round(share * value.numel())
    chosen[open_] = lowest(value.unsqueeze(0), count, gone.unsqueeze(0))[0]
    parts = torch.split(chosen, [scores[t.name].numel() for t in targets])
    return {
        t.name: part.reshape(scores[t.name].shape).to(scores[t.name].device)
        for t, part in zip(targets, parts, strict=True)
    }


def _joined(parts: Mapping[str, Tensor]) -> Tensor:
    """The elements of several tensors, on the device of the first."""
    device = next(iter(parts.values())).device
    return torch.cat([part.flatten().to(device) for part in parts.values()])


def _candidates(target: Target, scores: Tensor, removed: Tensor, options: GradualPruning) -> Tensor:
    """What may go: everything, or of a pattern what it would remove now."""
    if (nm := options.nm) is None:
        return torch.ones_like(removed)
    rows = target.rows(scores)
    kept = nm.mask(rows.contiguous(), target.rows(~removed).contiguous())
    return target.restored(~kept, scores.shape)
