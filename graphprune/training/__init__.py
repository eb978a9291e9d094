"""Training of what pruning has left: one engine for every model, with zeros held.

from graphprune.training import Training, hold, recover

training = Training(train="lora", loss="kd", steps=400)
found = recover(program, windows, training, masks=masks, teacher=dense)
found.program, found.losses, found.zeros
"""

from graphprune.training.core.options import LLM_PRUNER, Training
from graphprune.training.model.held import Handle, hold
from graphprune.training.recover import (
    Recovered,
    RecoveredProgram,
    Saving,
    recover,
    recover_module,
)
from graphprune.training.run import Callback, Progress
from graphprune.training.schedule.options import GradualPruning
from graphprune.training.schedule.pruner import GradualPruner, Pruned
from graphprune.training.text.token_file import TokenFile, token_file

__all__ = [
    "LLM_PRUNER",
    "Callback",
    "GradualPruner",
    "GradualPruning",
    "Handle",
    "Progress",
    "Pruned",
    "Recovered",
    "RecoveredProgram",
    "Saving",
    "TokenFile",
    "Training",
    "hold",
    "recover",
    "recover_module",
    "token_file",
]
