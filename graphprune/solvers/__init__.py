"""One-shot pruning of one layer: pure functions of a weight and a statistic of its inputs.

A solver is a frozen dataclass whose fields are its options, with a method
``solve(weight, statistic, pattern)``. Weights are [out, in]; masks are True where a weight is
kept; sparsity is the fraction removed.
"""

from graphprune.solvers.budget import outlier_ratio, owl, uniform
from graphprune.solvers.pattern import NM, Given, Pattern, Unstructured, strips
from graphprune.solvers.refit import Reconstruct
from graphprune.solvers.solved import Solved, Solver, relative_error
from graphprune.solvers.statistic import Moments, Norms, SecondMoment, Statistic

__all__ = [
    "NM",
    "Given",
    "Moments",
    "Norms",
    "Pattern",
    "Reconstruct",
    "SecondMoment",
    "Solved",
    "Solver",
    "Statistic",
    "Unstructured",
    "outlier_ratio",
    "owl",
    "relative_error",
    "strips",
    "uniform",
]
