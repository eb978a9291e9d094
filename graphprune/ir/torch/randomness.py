"""Random numbers in models: runs that are compared have to draw the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from graphprune.ir.torch.infer import source_line

# Arguments that switch the randomness of an operator on.
_SWITCHES = ("train", "training", "dropout_p")


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Let torch draw the numbers that follow `seed`, and give it its own state back afterwards.

    Two models that draw numbers of the same shapes in the same order draw the same ones.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if cuda else ()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA for later
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield


def draws(node: fx.Node) -> bool:
    """Whether a node takes numbers from torch's generator whenever it runs."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return all(given.get(name) for name in _SWITCHES if name in names)


def noise_sources(graph: fx.Graph) -> list[str]:
    """Name the operators of a graph that draw random numbers, with their lines of source.

    Returns:
        Such as "randn_like at vae.py:12", each once.
    """
    found: dict[str, None] = {}
    for node in graph.nodes:
        if draws(node):
            name = node.target._schema.name.partition("::")[2]
            found[" at ".join(filter(None, (name, source_line(node))))] = None
    return list(found)
