"""Repairs: refits of the weights that read what was cut, one a file, found by name.

Other packages add repairs with an entry point of the group ``graphprune.repairs`` whose name is the
repair's and whose value is its class; see `graphprune.passes.repair.protocol`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphprune.registry import Registry

if TYPE_CHECKING:
    from graphprune.passes.repair.protocol import Repair

__all__ = ["REPAIRS"]

REPAIRS: Registry[Repair] = Registry(
    "repair",
    "graphprune.repairs",
    {
        "bias": "graphprune.passes.repair.bias:Bias",
        "match": "graphprune.passes.repair.matching:Matching",
        "reconstruct": "graphprune.passes.repair.reconstruction:Reconstruction",
    },
)
