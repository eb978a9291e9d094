"""LoRAPrune: units are chosen by gradients of adapters, a few at a time, while these train.

Zhang et al., LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning, 2023
(arXiv:2305.18403).
"""

from graphprune.passes.loraprune.options import Pruning
from graphprune.passes.loraprune.run import LoRAPruned, check, loraprune

__all__ = ["LoRAPruned", "Pruning", "check", "loraprune"]
