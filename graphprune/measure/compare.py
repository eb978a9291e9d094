"""Measuring models side by side: a compilation's dense and slim one, or any that are on disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from graphprune.analysis.program import BaseProgram, GraphFormat
from graphprune.errors import EvaluationError
from graphprune.exclusive import alone, one_at_a_time
from graphprune.files.paths import is_factory
from graphprune.frontends import load_traced
from graphprune.ir.onnx.feeds import feeds_at
from graphprune.ir.onnx.files import EXTERNAL_ABOVE
from graphprune.ir.onnx.ort import onnx_session
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.onnx.tensors import weight_bytes
from graphprune.ir.torch.program import Program
from graphprune.ir.torch.workload import Example
from graphprune.measure.measuring import Measured, measure_on, measure_quality, unmeasurable
from graphprune.measure.onnx import measure_onnx
from graphprune.measure.remarks import quality_remarks
from graphprune.measure.sources import check_askable, check_loaded, shared_windows
from graphprune.measure.torch import latencies, usual_call, with_call
from graphprune.plan.plan import Plan
from graphprune.quality import perplexity
from graphprune.quality.attempts import attempted
from graphprune.quality.conditions import (
    QUALITY,
    Condition,
    ask_for,
    check_conditions,
    parse_all,
)
from graphprune.quality.measures import Measures
from graphprune.quality.result import Quality
from graphprune.quality.table import quality_table
from graphprune.quality.timing import Latency
from graphprune.recipe.recipe import Recipe
from graphprune.report.report import Report, comparison, speedups
from graphprune.rewrite.slim import Slim, apply
from graphprune.rewrite.slim_onnx import SlimOnnx

if TYPE_CHECKING:
    from rich.console import RenderableType

WINDOW = 512
"""Tokens in a window of text that models on disk are evaluated on."""


@one_at_a_time
def measured(
    report: Report,
    recipe: Recipe,
    slim: Slim | SlimOnnx,
    onnx: Path | None,
    scratch: Path,
    dense: BaseProgram | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Add latencies, and the quality of language models, to a report.

    What can't be measured is a note, since everything else of the work is done.

    Args:
        report: with the costs of both models.
        recipe: names the texts, and conditions that mustn't hold.
        slim: the slim model, and through it the dense one.
        onnx: the slim model's file, if it was written.
        scratch: a directory for the dense model's ONNX file.
        dense: the dense program, where that of the slim model has other weights.
        progress: told of each text.

    Raises:
        ConditionError: a condition of the recipe holds.
        EvaluationError: a number that a condition needs can't be measured.
    """
    program = slim.program if dense is None else dense
    measure = _MEASURES[program.format]
    report = measure(report, recipe, program, slim, onnx, scratch, progress)
    check_conditions(parse_all(recipe.fail_if), report.before, report.after, report.quality)
    return report


def _measured_torch(
    report: Report,
    recipe: Recipe,
    program: Program,
    slim: Slim,
    onnx: Path | None,
    scratch: Path,
    progress: Callable[[str], None],
) -> Report:
    """What texts say of both models, and their latencies."""
    notes: list[str] = []
    report = _with_quality(report, recipe, program, slim, progress)
    with attempted("latency", notes):
        report = _with_latencies(report, program, slim, onnx, scratch)
    return replace(report, notes=(*report.notes, *notes))


def _with_quality(
    report: Report,
    recipe: Recipe,
    program: Program,
    slim: Slim,
    progress: Callable[[str], None],
) -> Report:
    """What texts say of both models."""
    wanted = recipe.calibration
    notes: list[str] = []
    needed = ask_for(parse_all(recipe.fail_if), QUALITY)
    found = Measured({})
    with attempted("quality", notes, needed):
        why = unmeasurable(program, wanted)
        if why is not None:
            # Of models that were never meant to be measured on text it goes without saying.
            if program.is_causal or (wanted.text is not None and not recipe.needs_data):
                notes.append(f"no perplexity: {why}")
            return replace(report, notes=(*report.notes, *notes))
        models = (program.as_module(), slim.module)
        found = measure_quality(program, models, wanted, recipe.seed, progress, needed=needed)
    remarks = quality_remarks(found.dense, found.slim, found.quality, trained=bool(report.trained))
    return replace(
        report,
        before=replace(report.before, perplexities=found.dense),
        after=replace(report.after, perplexities=found.slim),
        quality=found.quality,
        notes=(*report.notes, *remarks, *notes, *found.notes),
    )


def _with_latencies(
    report: Report, program: Program, slim: Slim, onnx: Path | None, scratch: Path
) -> Report:
    """MACs of the usual call, and latencies of both models with it, in all runtimes."""
    notes: list[str] = []
    modules = (program.as_module(), slim.module)
    call = usual_call(program, modules)
    macs = (program.costs_at(call.workload).total().macs, slim.cost_at(call.workload).macs)
    before = with_call(report.before, call, macs[0])
    after = with_call(report.after, call, macs[1])
    with attempted("latency in PyTorch", notes):
        taken = latencies([call.of(module) for module in modules])
        before = replace(before, torch=replace(taken[0], macs=macs[0]))
        after = replace(after, torch=replace(taken[1], macs=macs[1]))
    if onnx is not None and find_spec("onnxruntime") is not None:
        with attempted("latency in ONNX Runtime", notes):
            taken = _onnx_latencies(program, call.example, onnx, scratch)
            before = replace(before, onnxruntime=replace(taken[0], macs=macs[0]))
            after = replace(after, onnxruntime=replace(taken[1], macs=macs[1]))
    notes = [*call.notes, *notes]
    return replace(report, before=before, after=after, notes=(*report.notes, *notes))


def _onnx_latencies(program: Program, example: Example, onnx: Path, scratch: Path) -> list[Latency]:
    """Latencies of both models as ONNX files, of which the dense one is written for that."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        whole = Path(folder) / "dense.onnx"
        apply(program, Plan(program.fingerprint, {})).save(whole, "onnx")
        return perplexity.onnx_latencies([whole, onnx], _feeds(onnx, example))


def _measured_onnx(
    report: Report,
    recipe: Recipe,
    program: OnnxProgram,
    slim: SlimOnnx,
    onnx: Path | None,
    scratch: Path,
    progress: Callable[[str], None],
) -> Report:
    """Latencies of both files; texts are read for PyTorch models only."""
    del recipe, program, scratch, progress
    notes: list[str] = []
    with attempted("latency in ONNX Runtime", notes):
        report = _with_latencies_onnx(report, slim, onnx)
    return replace(report, notes=(*report.notes, *notes))


_MEASURES: Mapping[GraphFormat, Callable[..., Report]] = {
    "torch": _measured_torch,
    "onnx": _measured_onnx,
}


def _with_latencies_onnx(report: Report, slim: SlimOnnx, file: Path | None) -> Report:
    """Latencies of both files on the same random inputs, which their MACs are of too."""
    if file is None or find_spec("onnxruntime") is None:
        return report
    if weight_bytes(slim.program.model) > EXTERNAL_ABOVE:
        note = "no latency: ONNX Runtime would hold copies of more than 1 GiB; eval measures it"
        return replace(report, notes=(*report.notes, note))
    feeds = feeds_at(slim.program, slim.program.workload)
    with slim.program.file() as dense:
        latencies = perplexity.onnx_latencies([dense, file], feeds)
    before, after = (
        replace(side, onnxruntime=replace(latency, macs=side.macs))
        for side, latency in zip((report.before, report.after), latencies, strict=True)
    )
    return replace(report, before=before, after=after)


@dataclass(frozen=True)
class Evaluation:
    """What was measured of models on disk.

    Attributes:
        sources: one, or the dense and the slim one.
        models: of each.
        quality: of both beside each other; of a single one, its completions.
        notes: what couldn't be measured, and what there is to say.
    """

    sources: Sequence[str]
    models: list[Measures]
    quality: Quality | None
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Everything as JSON, by source."""
        data = {s: one.as_data() for s, one in zip(self.sources, self.models, strict=True)}
        last = data[self.sources[-1]]
        if len(self.models) > 1:
            last["speedup"] = speedups(*self.models)
        last["quality"] = None if self.quality is None else asdict(self.quality)
        last["notes"] = [*last["notes"], *self.notes]
        return json.dumps(data, indent=2) + "\n"

    def render(self) -> RenderableType:
        """The tables with their conditions, for a rich console."""
        from rich.console import Group
        from rich.text import Text

        titles = (Path(self.sources[0]).name, Path(self.sources[-1]).name)
        before, after = self.models[0], self.models[1] if len(self.models) > 1 else None
        table = comparison(before, after, titles)
        quality = quality_table(before, after, self.quality, titles)
        return Group(table, *quality, *(Text(f"note: {note}") for note in self.notes))


@one_at_a_time
def measure_sources(
    sources: Sequence[str],
    texts: Sequence[str],
    length: int | None,
    count: int | None,
    progress: Callable[[str], None],
    threads: int | None = None,
    *,
    conditions: Sequence[Condition] = (),
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> Evaluation:
    """Measure models on disk, all on the same windows; latencies are taken in turns.

    Args:
        sources: checkpoints, hub ids or ``.onnx`` files (of which no perplexity).
        texts: where to take text from; none uses our own two for models that text suits.
        length: tokens in a window, and of the input that is timed; None for 512 and 128.
        count: number of windows of each text; None takes all of a given text, and enough of ours.
        progress: told of each stage.
        threads: within an operator; None for PyTorch's number.
        conditions: what will be asked of the last model; see that it can be, before measuring.
        trust: whether checkpoints and ``.pt2`` files may run code of their own.
        allow_unused_weights: see `graphprune.load`.

    Raises:
        LoadError: a model or a text can't be opened, or no model has a tokenizer.
        EvaluationError: a text was given, and a model is no causal language model.
        RecipeError: a condition can't be evaluated.
    """
    check_askable(conditions, sources)
    programs: dict[str, Program] = {}
    for source in sources:
        if not source.endswith(".onnx"):
            progress(f"loading {source}")
            programs[source] = load_traced(
                source, trust=trust, allow_unused_weights=allow_unused_weights
            )
    windows = shared_windows(programs, texts, length or WINDOW, count)
    check_loaded(conditions, programs, windows)
    modules = {source: program.as_module() for source, program in programs.items()}
    suited = {s for s, p in programs.items() if windows and (texts or p.is_causal)}
    with _threads(threads):
        if programs:
            progress("measuring latency")
        timed = _timed(programs, modules, length)
        files = [source for source in sources if source not in programs]
        found = dict(zip(files, measure_onnx(files, length, progress), strict=True))
    read = measure_on(
        {s: p for s, p in programs.items() if s in suited}, modules, windows, progress
    )
    for source in programs:
        found[source] = replace(timed[source], perplexities=read.perplexities.get(source, {}))
    models = [replace(found[s], files=_size(s, programs.get(s))) for s in sources]
    return Evaluation(sources, models, read.quality, read.notes)


def _timed(
    programs: Mapping[str, Program], modules: Mapping[str, Callable[..., Any]], length: int | None
) -> dict[str, Measures]:
    """Sizes of models and their latencies, in turns."""
    calls = {s: usual_call(program, [modules[s]], length) for s, program in programs.items()}
    taken = latencies([calls[s].of(modules[s]) for s in programs])
    found = {}
    for (source, program), latency in zip(programs.items(), taken, strict=True):
        cost = program.costs_at(calls[source].workload).total()
        one = Measures(cost.params, bytes=cost.bytes, notes=calls[source].notes)
        timed = replace(latency, macs=cost.macs)
        found[source] = replace(with_call(one, calls[source], cost.macs), torch=timed)
    return found


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


def _size(source: str, program: Program | None) -> int | None:
    """Bytes on disk; None for what a factory makes."""
    if program is not None and is_factory(source):
        return None
    return perplexity.size_on_disk(_path_of(source, program))


def _path_of(source: str, program: Program | None) -> Path:
    """Where a source lies on disk; a hub id in the cache."""
    if program is not None and program.source is not None and program.source.path is not None:
        return program.source.path
    return Path(source)


def _feeds(path: Path, inputs: Example) -> dict[str, Any]:
    """A model's inputs by the names that its ONNX file has for them."""
    names = [entry.name for entry in onnx_session(path).get_inputs()]
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
