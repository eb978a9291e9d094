"""What processes of their own do in tests of LoRAPrune."""

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from graphprune.passes.loraprune import Pruning, loraprune
from graphprune.training import Training
from training.nets import labelled, program


def prune(gradient, micro_batch=None):
    """Prune a small net in float64, on samples of which some have more labels than others."""
    training = Training(
        train="lora", loss="ce", steps=12, batch=4, lr=1e-2, dropout=0.0, clip=0.05,
        micro_batch=micro_batch,
    )  # fmt: skip
    pruning = Pruning({"remove": {"ffn": 0.5}}, gradient=gradient, uniform=False)
    return loraprune(program(torch.float64), labelled(), pruning, training)


def two(folder, gradient):
    """What a process of two does: prune, and write what came out."""
    found = prune(gradient, micro_batch=1)
    found.plan.save(folder / f"plan-{dist.get_rank()}.json")
    if dist.get_rank() == 0:
        names = sorted(found.program.trainable - set(found.program.aliases))
        weights = {n: found.program.weights[n].detach().contiguous() for n in names}
        save_file(weights, folder / "two.safetensors")
