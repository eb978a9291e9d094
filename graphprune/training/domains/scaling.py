"""Reference losses of a model of another size, from those of some sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphprune.errors import TrainingError
from graphprune.plan.units import FloatArray

_EXPONENTS = np.geomspace(1e-3, 3.0, 400)
_ROUNDS = 6


def extrapolated(sizes: Sequence[float], losses: Sequence[float], size: float) -> float:
    """The loss of a model of some size, by a fit of ``a / size ** b + c``.

    For each exponent the best a and c are those of a linear fit; the exponent is looked for in ever
    narrower steps.

    Args:
        sizes: numbers of parameters of three models or more.
        losses: theirs.
        size: of the model that is asked for.

    Raises:
        TrainingError: there are fewer than three sizes, or they don't differ.
    """
    if len(sizes) != len(losses) or len(set(sizes)) < 3:
        raise TrainingError(
            "a scaling law needs losses of three sizes",
            why=f"there are {len(losses)} losses of {len(set(sizes))} sizes",
            hint="take the losses of the source model as reference",
        )
    n, y = np.asarray(sizes, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    scale = float(np.exp(np.log(n).mean()))
    tried = _EXPONENTS
    for _ in range(_ROUNDS):
        errors = [_fit(n / scale, y, b)[1] for b in tried]
        best = int(np.argmin(errors))
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
        exponent = float(tried[best])
        tried = np.linspace(low, high, 100)
    (a, c), _ = _fit(n / scale, y, exponent)
    return float(a * (size / scale) ** -exponent + c)


def _fit(n: FloatArray, y: FloatArray, b: float) -> tuple[tuple[float, float], float]:
    """The best a and c for an exponent, and the error that they leave."""
    columns = np.stack([n**-b, np.ones_like(n)], axis=1)
    found = np.linalg.lstsq(columns, y, rcond=None)[0]
    return (float(found[0]), float(found[1])), float(((columns @ found - y) ** 2).sum())
