"""Calibration over a graph, weight by weight, with activations of what is already treated.

program = gp.load("path/to/checkpoint")
sites = find_sites(program)
samples = batches(program, text_windows(program, count=64, length=512))
new = stream(program, sites, samples, treatment)
pruned = apply_weights(program, new)
"""

from graphprune.calibration.batches import Batch
from graphprune.calibration.programs import batches
from graphprune.calibration.tokens import text_windows
from graphprune.placement.waiting import Held
from graphprune.streaming.core.checkpoint import State
from graphprune.streaming.core.layout import Bank, Convolution, Experts, Layout, Matrix
from graphprune.streaming.core.observer import Additive, Observer
from graphprune.streaming.core.sites import Group, Site, Sites
from graphprune.streaming.core.treatment import Separable, Step, Treatment
from graphprune.streaming.core.weights import TreatedWeights
from graphprune.streaming.programs import (
    apply_weights,
    find_biases,
    find_sites,
    in_streams,
    stream,
)

__all__ = [
    "Additive",
    "Bank",
    "Batch",
    "Convolution",
    "Experts",
    "Group",
    "Held",
    "Layout",
    "Matrix",
    "Observer",
    "Separable",
    "Site",
    "Sites",
    "State",
    "Step",
    "TreatedWeights",
    "Treatment",
    "apply_weights",
    "batches",
    "find_biases",
    "find_sites",
    "in_streams",
    "stream",
    "text_windows",
]
