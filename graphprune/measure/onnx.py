"""Measuring ONNX files side by side in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from graphprune.analysis.workload import LENGTH, Workload
from graphprune.errors import GraphPruneError, LoadError
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx.feeds import feeds_at
from graphprune.ir.onnx.ort import example_feeds, onnx_session
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.quality import perplexity
from graphprune.quality.measures import Measures
from graphprune.quality.timing import in_turns


def measure_onnx(
    files: Sequence[str | Path],
    length: int | None,
    progress: Callable[[str], None],
    threads: int | None = None,
) -> list[Measures]:
    """Latency of ONNX files, in turns, with the multiply-accumulates of the calls.

    Inputs are random, a batch of one; where a model leaves other sizes open, `length`, or what the
    model can take. Its multiply-accumulates are those for these sizes.

    Args:
        files: the ``.onnx`` files.
        length: tokens, frames or pixels along dimensions that a model leaves open; None for 128.
        progress: told of each stage.
        threads: within an operator; None uses as many as PyTorch does.

    Raises:
        LoadError: ONNX Runtime can't open a file.
        EvaluationError: no inputs can be made up for one.
    """
    threads = torch.get_num_threads() if threads is None else threads
    calls, found = [], []
    for file in files:
        progress(f"loading {file}")
        session = onnx_session(file, threads)
        feeds = example_feeds(session, length or LENGTH)
        program, notes = _program(Path(file), {n: v.shape for n, v in feeds.items()})
        if program is None:
            one = Measures(perplexity.onnx_parameters(file))
            workload = Workload({name: tuple(value.shape) for name, value in feeds.items()})
        else:
            workload = program.workload_of(LENGTH if length is None else length)
            feeds = feeds_at(program, workload)
            cost = program.costs_at(workload).total()
            one = Measures(cost.params, cost.macs, cost.bytes)
        shapes = dict(workload.shapes)
        found.append(replace(one, input=str(workload), inputs=shapes, notes=notes))
        calls.append(partial(session.run, None, feeds))
    if files:
        progress("measuring latency in ONNX Runtime")
    latencies = in_turns(calls, None, threads, "onnxruntime")
    return [
        replace(one, onnxruntime=replace(latency, macs=one.macs))
        for one, latency in zip(found, latencies, strict=True)
    ]


def _program(
    file: Path, shapes: Mapping[str, Sequence[int]]
) -> tuple[OnnxProgram | None, tuple[str, ...]]:
    """A file as a program whose first example has these shapes, or such that the model takes."""
    try:
        return load_onnx(file, shapes), ()
    except LoadError:
        pass
    try:
        return load_onnx(file), ()
    except GraphPruneError as error:  # ONNX Runtime may run what the checker refuses
        why = f": {error.why}" if error.why else ""
        return None, (f"multiply-accumulates are not known, {error.what}{why}",)
