"""Methods that make single weights zero, one a file.

Each is a frozen dataclass whose fields are its options, with a method
``solve(weight, statistic, pattern)``; see `graphprune.solvers`.
"""

from graphprune.passes.masks.alps import ALPS
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda

__all__ = ["ALPS", "RIA", "DSnoT", "Magnitude", "SparseGPT", "Wanda"]
