"""Measuring models side by side: a compilation's dense and slim one, or any that are on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphprune import evaluate
from graphprune.axes import Atom
from graphprune.calibration import BUILTIN, read_text, windows
from graphprune.emit.onnx import EXTERNAL_ABOVE
from graphprune.errors import EvaluationError, LoadError
from graphprune.exclusive import alone, one_at_a_time
from graphprune.frontends import load_traced
from graphprune.inputs import is_causal, tokenizer_of
from graphprune.measure_onnx import measure_onnx
from graphprune.onnx_program import SlimOnnx
from graphprune.onnx_tensors import weight_bytes
from graphprune.paths import is_factory
from graphprune.plan import Plan
from graphprune.program import BaseProgram, Program
from graphprune.recipe import Recipe
from graphprune.report import Measures, Report
from graphprune.rewrite.slim import Slim, apply
from graphprune.samples.tokens import evaluation_windows, tokenizer_for
from graphprune.timing import Latency
from graphprune.verification_onnx import random_feeds

# Times the dense model's perplexity, from which on nobody would deploy a model as it is.
RUINED = 10

Example = tuple[tuple[Any, ...], dict[str, Any]]


@one_at_a_time
def measured(
    report: Report,
    recipe: Recipe,
    slim: Slim | SlimOnnx,
    onnx: Path | None,
    scratch: Path,
    dense: BaseProgram | None = None,
) -> Report:
    """Add latencies, and perplexities where there is text, to a report.

    Args:
        report: with the costs of both models.
        recipe: names the text.
        slim: the slim model, and through it the dense one.
        onnx: the slim model's file, if it was written.
        scratch: a directory for the dense model's ONNX file.
        dense: the dense program, where that of the slim model has other weights.
    """
    if isinstance(slim, SlimOnnx):
        return _measured_onnx(report, slim, onnx)
    program = dense if isinstance(dense, Program) else slim.program
    whole_model = _module(program)
    texts, notes = _evaluation_windows(recipe, program)
    inputs = program.example if texts is None else ((), {"input_ids": texts[:2]})
    sizes = _sizes(program, inputs)
    macs = (program.costs.total(sizes).macs, slim.cost_at(sizes).macs)
    latencies = evaluate.torch_latencies([whole_model, slim.module], *inputs)
    before = replace(report.before, torch=replace(latencies[0], macs=macs[0]))
    after = replace(report.after, torch=replace(latencies[1], macs=macs[1]))
    if texts is not None:
        before = replace(before, perplexity=evaluate.perplexity(whole_model, texts))
        after = replace(after, perplexity=evaluate.perplexity(slim.module, texts))
        notes = (*notes, *_ruined(before.perplexity, after.perplexity))
    if onnx is not None and find_spec("onnxruntime") is not None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            whole = Path(folder) / "dense.onnx"
            apply(program, Plan(program.fingerprint, {})).save(whole, "onnx")
            feeds = _feeds(onnx, inputs)
            latencies = evaluate.onnx_latencies([whole, onnx], feeds)
        before = replace(before, onnxruntime=replace(latencies[0], macs=macs[0]))
        after = replace(after, onnxruntime=replace(latencies[1], macs=macs[1]))
    return replace(report, before=before, after=after, notes=(*report.notes, *notes))


def _ruined(dense: evaluate.Perplexity | None, slim: evaluate.Perplexity | None) -> tuple[str, ...]:
    """What to say where pruning has cost the model its language."""
    if dense is None or slim is None or slim.value < RUINED * dense.value:
        return ()
    return (
        f"perplexity rose from {dense.value:.4g} to {slim.value:.4g}: without training the slim "
        "model is of no use; remove less, or score by taylor on text like your own",
    )


def _measured_onnx(report: Report, slim: SlimOnnx, file: Path | None) -> Report:
    """Latencies of both files on the same random inputs."""
    if file is None or find_spec("onnxruntime") is None:
        return report
    if weight_bytes(slim.program.model) > EXTERNAL_ABOVE:
        note = "no latency: ONNX Runtime would hold copies of more than 1 GiB; eval measures it"
        return replace(report, notes=(*report.notes, note))
    feeds = random_feeds(slim.program)
    with slim.program.file() as dense:
        latencies = evaluate.onnx_latencies([dense, file], feeds)
    before, after = (
        replace(side, onnxruntime=replace(latency, macs=side.macs))
        for side, latency in zip((report.before, report.after), latencies, strict=True)
    )
    return replace(report, before=before, after=after)


@one_at_a_time
def measure_sources(
    sources: Sequence[str],
    text: str | None,
    length: int,
    count: int | None,
    progress: Callable[[str], None],
    threads: int | None = None,
    *,
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> list[Measures]:
    """Measure models on disk, all on the same windows; latencies are taken in turns.

    Args:
        sources: checkpoints, hub ids or ``.onnx`` files (of which no perplexity).
        text: where to take text from; None uses the built-in one for models that text suits.
        length: tokens in a window.
        count: number of windows; None takes all.
        progress: told of each stage.
        threads: within an operator; None for PyTorch's number.
        trust: whether checkpoints and ``.pt2`` files may run code of their own.
        allow_unused_weights: see `graphprune.load`.

    Raises:
        LoadError: a model or the text can't be opened, or no model has a tokenizer.
        EvaluationError: a text was given, and a model is no causal language model.
    """
    programs: dict[str, Program] = {}
    for source in sources:
        if not source.endswith(".onnx"):
            progress(f"loading {source}")
            programs[source] = load_traced(
                source, trust=trust, allow_unused_weights=allow_unused_weights
            )
    texts = _shared_windows(list(programs.values()), text, length, count)
    modules = {source: _module(program) for source, program in programs.items()}
    suited = {s: texts is not None and (text is not None or is_causal(p)) for s, p in
              programs.items()}  # fmt: skip
    with _threads(threads):
        if programs:
            progress("measuring latency")
        latencies = _latencies(programs, modules, texts if all(suited.values()) else None)
        files = [source for source in sources if source not in programs]
        found = dict(zip(files, measure_onnx(files, length, progress), strict=True))
    for source, program in programs.items():
        progress(f"measuring {source}")
        cost = program.costs.total()
        perplexity = None
        if texts is not None and suited[source]:
            perplexity = evaluate.perplexity(modules[source], texts)
        found[source] = Measures(
            cost.params, cost.macs, torch=latencies[source], perplexity=perplexity
        )
    return [replace(found[s], bytes=_size(s, programs.get(s))) for s in sources]


def _latencies(
    programs: Mapping[str, Program],
    modules: Mapping[str, Callable[..., Any]],
    texts: torch.Tensor | None,
) -> dict[str, Latency]:
    """Latencies of models, in turns: on text, or of each on its own example."""
    inputs = {
        source: program.example if texts is None else ((), {"input_ids": texts[:2]})
        for source, program in programs.items()
    }
    calls = [partial(modules[s], *args, **kwargs) for s, (args, kwargs) in inputs.items()]
    found = zip(programs.items(), evaluate.torch_latencies(calls), strict=True)
    return {
        source: replace(latency, macs=program.costs.total(_sizes(program, inputs[source])).macs)
        for (source, program), latency in found
    }


def _sizes(program: Program, inputs: Example) -> dict[Atom, int]:
    """Sizes of the dynamic axes of token ids, where a call has others than the example."""
    given, ids = inputs[1].get("input_ids"), program.typing.values.get("input_ids")
    if given is None or not ids:
        return {}
    return {
        axis: size
        for axis, size in zip(ids[0], given.shape, strict=True)
        if isinstance(axis, Atom) and axis.size != size
    }


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """Let PyTorch compute on so many threads."""
    with alone():
        before = torch.get_num_threads()
        torch.set_num_threads(before if wanted is None else wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _module(program: Program) -> Callable[..., Any]:
    return program.module if program.module is not None else program.exported.module()


def _shared_windows(
    programs: Sequence[Program], text: str | None, length: int, count: int | None
) -> torch.Tensor | None:
    if text is None and not any(map(is_causal, programs)):
        return None
    tokenizer = next((t for p in programs if (t := tokenizer_of(p)) is not None), None)
    if tokenizer is None:
        if text is None or not programs:
            return None
        raise LoadError("text needs a tokenizer, and the model has none")
    return windows(tokenizer, read_text(text or BUILTIN), length=length, count=count)


def _size(source: str, program: Program | None) -> int:
    """Bytes on disk; of what a factory makes, in memory."""
    if program is not None and is_factory(source):
        return program.costs.total().bytes
    return evaluate.size_on_disk(_path_of(source, program))


def _path_of(source: str, program: Program | None) -> Path:
    """Where a source lies on disk; a hub id in the cache."""
    if program is not None and program.source is not None and program.source.path is not None:
        return program.source.path
    return Path(source)


def _evaluation_windows(
    recipe: Recipe, program: Program
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Windows to evaluate on, or why there are none."""
    wanted = recipe.calibration
    asked = wanted.text is not None
    if not is_causal(program):
        if asked and not recipe.needs_data:
            return None, ("no perplexity: not a causal language model",)
        return None, ()
    if not asked and tokenizer_for(program, wanted) is None:
        return None, ("no perplexity: the checkpoint has no tokenizer",)
    return evaluation_windows(program, wanted, recipe.seed), ()


def _feeds(path: Path, inputs: Example) -> dict[str, Any]:
    """A model's inputs by the names that its ONNX file has for them."""
    names = [entry.name for entry in evaluate.onnx_session(path).get_inputs()]
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    if len(names) != len(leaves):
        raise EvaluationError(
            "the ONNX file has other inputs than the model",
            where=str(path),
            why=f"{', '.join(names)} instead of {len(leaves)} tensors",
        )
    # bfloat16 models are written in float32.
    wide = [leaf.float() if leaf.dtype == torch.bfloat16 else leaf for leaf in leaves]
    return {name: leaf.numpy() for name, leaf in zip(names, wide, strict=True)}
