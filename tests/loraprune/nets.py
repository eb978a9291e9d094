"""A small language model with grouped queries and biases, to train and to prune."""

import functools

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.passes.loraprune import Pruning, check
from graphprune.training import Callback, Training

LAYERS, WIDTH, HEADS, OWNERS, SIZE, FFN = 2, 16, 8, 2, 4, 12
"""Layers, hidden size, query heads, key-value heads, size of a head, ffn channels."""


class Net(nn.Module):
    """A llama that gives logits alone."""

    def __init__(self, **more):
        super().__init__()
        torch.manual_seed(0)
        config = {
            "vocab_size": 40,
            "hidden_size": WIDTH,
            "intermediate_size": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": OWNERS,
            "head_dim": SIZE,
            "attention_bias": True,
            "mlp_bias": True,
            "initializer_range": 0.3,
        }
        self.lm = LlamaForCausalLM(LlamaConfig(**config | more)).eval()
        with torch.no_grad():
            for name, parameter in self.lm.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3)

    def forward(self, ids):
        return self.lm(ids, use_cache=False).logits


@functools.cache
def program(dtype=torch.float32, **more):
    return gp.trace(Net(**more).to(dtype).eval(), (torch.randint(0, 40, (2, 6)),))


def data():
    return torch.randint(0, 40, (14, 6), generator=torch.Generator().manual_seed(1))


def options(**more):
    return Training(**{"train": "lora", "loss": "ce", "batch": 4, "steps": 20, "lr": 1e-2, **more})


def pruner(net, pruning, training):
    return check(net, pruning, training)[1]


def halves(**more):
    return Pruning({"remove": {"ffn": 0.5, "kv_heads": 0.5}}, **more)


def spans(layer):
    """What belongs to each unit, written down by hand.

    Returns:
        Role to the weight's name, the dimension and each unit's positions; key-value head j owns
        query heads 4 j to 4 j + 3.
    """
    at = f"lm.model.layers.{layer}"
    share = HEADS // OWNERS * SIZE
    queries = [range(j * share, (j + 1) * share) for j in range(OWNERS)]
    keys = [range(j * SIZE, (j + 1) * SIZE) for j in range(OWNERS)]
    channels = [range(j, j + 1) for j in range(FFN)]
    return {
        "kv_heads": [
            (f"{at}.self_attn.q_proj.weight", 0, queries),
            (f"{at}.self_attn.k_proj.weight", 0, keys),
            (f"{at}.self_attn.v_proj.weight", 0, keys),
            (f"{at}.self_attn.o_proj.weight", 1, queries),
        ],
        "ffn": [
            (f"{at}.mlp.gate_proj.weight", 0, channels),
            (f"{at}.mlp.up_proj.weight", 0, channels),
            (f"{at}.mlp.down_proj.weight", 1, channels),
        ],
    }


def unit_scores(layer, role, elements):
    """The scores of units, by LoRAPrune's formulas alone.

    Args:
        elements: name of a weight to the importance of its elements, float64.
    """
    total = 0
    for name, dim, places in spans(layer)[role]:
        sums = [np.take(elements[name], list(p), axis=dim).sum() for p in places]
        total = total + np.array(sums) / np.linalg.norm(sums)
    return total


def structure_of(net, layer, role):
    (found,) = [s for s in net.structures
                if s.role == role and f"layers.{layer}." in s.name and s.prunable]  # fmt: skip
    return found.name


class Watched(Callback):
    """A callback that is handed on, while somebody looks at it."""

    def __init__(self, inner, looked=None, changed=None):
        self.inner, self.looked, self.changed = inner, looked, changed

    def identity(self):
        return self.inner.identity()

    def attach(self, run):
        self.trainable = run.trainable
        self.inner.attach(run)

    def on_gradients(self, step, scale):
        if self.looked is not None:
            self.looked(self.trainable, step + 1, scale)
        self.inner.on_gradients(step, scale)

    def after_step(self, step, optimizer):
        found = self.inner.after_step(step, optimizer)
        if self.changed is not None:
            self.changed(self.trainable, step + 1, found)
        return found

    def tensors(self):
        return self.inner.tensors()

    def restore(self, step, tensors):
        self.inner.restore(step, tensors)
