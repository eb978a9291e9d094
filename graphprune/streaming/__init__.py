"""Calibration over a graph, weight by weight, with activations of what is already treated.

program = gp.load("path/to/checkpoint")
sites = find_sites(program)
samples = batches(program, text_windows(program, count=64, length=512))
new = stream(program, sites, samples, treatment)
pruned = apply_weights(program, new)
"""

from graphprune.streaming.data import Batch, default_window, text_windows
from graphprune.streaming.held import Held
from graphprune.streaming.layout import Bank, Convolution, Experts, Layout, Matrix
from graphprune.streaming.observer import Observer
from graphprune.streaming.programs import apply_weights, batches, find_sites, in_streams, stream
from graphprune.streaming.run import Step, Treatment
from graphprune.streaming.sites import Group, Site, Sites
from graphprune.streaming.state import State
from graphprune.streaming.weights import TreatedWeights

__all__ = [
    "Bank",
    "Batch",
    "Convolution",
    "Experts",
    "Group",
    "Held",
    "Layout",
    "Matrix",
    "Observer",
    "Site",
    "Sites",
    "State",
    "Step",
    "TreatedWeights",
    "Treatment",
    "apply_weights",
    "batches",
    "default_window",
    "find_sites",
    "in_streams",
    "stream",
    "text_windows",
]
