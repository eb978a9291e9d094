"""Samples as masks take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.result import Samples
from graphprune.errors import LoadError
from graphprune.ir.onnx.feeds import random_feeds
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import is_traced
from graphprune.streaming import Batch, batches


def example_samples(program: BaseProgram) -> Samples:
    """The example inputs, for methods that look at no data."""
    data: Any
    if is_traced(program):
        data = [Batch(*program.example)]
    else:
        data = [random_feeds(cast("OnnxProgram", program))]
    return Samples(data, "the example inputs", "arrays", 1)


def together(program: BaseProgram, samples: Samples) -> Samples:
    """Samples in batches of the size that a graph has fixed; as they are where it hasn't.

    Raises:
        LoadError: they don't fill one batch.
    """
    sizes = {i.shape[0] for i in program.signature() if i.shape}
    size = sizes.pop() if len(sizes) == 1 else None
    if size in (None, 1) or isinstance(samples.data, list | tuple):
        return samples
    assert size is not None
    count = samples.count // size * size
    if not count:
        raise LoadError(
            "there are fewer samples than the model takes at a time",
            where=samples.source,
            why=f"{samples.count}, and its batches have {size}",
            hint="give more samples, or export the model with a dynamic batch",
        )
    given = samples.data
    first = (
        {n: v[:count] for n, v in given.items()} if isinstance(given, Mapping) else given[:count]
    )
    notes = samples.notes
    if count < samples.count:
        left = samples.count - count
        notes += (f"the model takes {size} samples at a time: the last {left} are left out",)
    return replace(samples, data=batches(program, first, size), count=count, notes=notes)
