"""The whole way from a source to files: load, plan, rewrite, verify, write, measure.

:func:`compile` is the one place that knows the order of things. Nothing is written before the slim
model has been compared with the masked one, and everything is written beside its place and then
renamed, so that a failed or interrupted run leaves nothing behind.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from graphprune.analysis.cost import Cost
from graphprune.errors import EmitError, LoadError, RecipeError
from graphprune.frontends import load
from graphprune.frontends.factory import file_of, is_factory
from graphprune.frontends.module import trace
from graphprune.measure import is_causal, measured, token_windows, tokenizer_of
from graphprune.onnx_program import OnnxProgram, SlimOnnx
from graphprune.passes.reduce import PIECE
from graphprune.passes.select import select
from graphprune.plan import Plan
from graphprune.program import BaseProgram, Program
from graphprune.pruning import apply, verify
from graphprune.recipe import FORMATS, Recipe
from graphprune.report import Measures, Report
from graphprune.rewrite.slim import Slim
from graphprune.rounds import composed, interim_goal, retrace
from graphprune.selector import named
from graphprune.target import Target
from graphprune.verification import Certificate

Progress = Callable[[str], None]


def compile(
    source: str | Path | torch.nn.Module | BaseProgram,
    recipe: Recipe | Mapping[str, object] | str | Path,
    output: str | Path | None = None,
    formats: Sequence[str] | None = None,
    *,
    dry_run: bool = False,
    seed: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    example: tuple[Any, ...] | Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> Report:
    """Prune a model and write it.

    Args:
        source: a checkpoint directory, hub id, ``.pt2`` or ``.onnx`` file or ``module:factory``; a
            module with an `example`; or a program.
        recipe: a recipe, its plain data, or the path of a YAML file.
        output: a directory, or a ``.pt2`` or ``.onnx`` file; None only with `dry_run`.
        formats: hf, onnx, onnx-decoder, pt2; overrides the recipe's. The Hugging Face files are
            put into the output directory itself, the others are model.onnx, decoder.onnx and
            model.pt2 in it. Where neither says anything it is hf for a checkpoint, onnx for ONNX,
            and pt2 for everything else.
        dry_run: plan and report what would happen; write nothing.
        seed: overrides the recipe's.
        progress: called with the name of each stage as it begins.
        overwrite: replace an output that exists, if it is one of ours or a file.
        example: example inputs of a module: positional, or by keyword.
        weights: a safetensors file with the state dict of a factory's module.

    Raises:
        GraphPruneError: something that the caller can put right; nothing has been written then.
        VerifyError: the slim model doesn't equal the masked one; nothing has been written.
    """
    settled = _with_formats(_settle(recipe, formats, seed), source, output)
    on_disk = file_of(source) if isinstance(source, str | Path) else source
    target = None if dry_run else Target.of(output, settled, overwrite, on_disk)
    run = _Run(settled, progress or (lambda stage: None))
    with run.stage("loading and tracing"):
        program = named(_open(source, example, weights), settled.names)
    wanted = target.formats if target else settled.formats
    _check_formats(wanted, program, source)
    if not dry_run:
        with run.stage("checking weights"):
            _check_weights(program)
    run.recipe = settled = _with_score(settled, program)
    plan = run.choose(program)
    slim = _planned(program, plan)
    if target is not None and isinstance(slim, SlimOnnx):
        slim.check_output(target.path)
    with run.stage("checking the formats"):
        native, notes = (
            _native(slim, settled) if isinstance(slim, Slim) and "hf" in wanted else (None, ())
        )
    report = Report(
        source=_shown(source),
        weights=None if weights is None else str(Path(weights).absolute()),
        before=_measures(program.costs.total()),
        after=_measures(slim.cost),
        kept=_kept(slim),
        score=None if settled.plan else settled.score.name,
        native=native,
        notes=notes,
        seconds=run.seconds,
    )
    return report if target is None else run.write(program, plan, report, target)


def choose(program: BaseProgram, recipe: Recipe) -> Plan:
    """The plan that `compile` makes of a recipe; nothing is cut or written.

    Raises:
        GraphPruneError: see `compile`.
    """
    run = _Run(_with_score(recipe, program), lambda stage: None)
    return run.choose(named(program, recipe.names))


@dataclass
class _Run:
    """One compilation.

    Attributes:
        recipe: what to do.
        progress: told of each stage.
        seconds: time taken by the stages that are over.
    """

    recipe: Recipe
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        self.progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def choose(self, program: BaseProgram) -> Plan:
        """The saved plan of the recipe, or a new one, made in as many rounds as it asks for."""
        if self.recipe.plan is not None:
            return Plan.load(self.recipe.plan)
        calibration = None
        if self.recipe.needs_data:
            with self.stage("reading calibration text"):
                calibration = token_windows(self.recipe, program)[1]
        plan = Plan(program.fingerprint, {})
        slim, current = None, program
        for number in range(1, self.recipe.rounds + 1):
            suffix = f" ({number} of {self.recipe.rounds})" if self.recipe.rounds > 1 else ""
            with self.stage(f"selecting{suffix}"):
                found = self._select(current, interim_goal(self.recipe, program, current, number),
                                     calibration)  # fmt: skip
                plan = composed(slim, current, found) if slim else found
                if number < self.recipe.rounds:
                    slim = _traced(apply(program, plan))
                    current = named(retrace(slim), self.recipe.names)
        return plan

    def _select(
        self, program: BaseProgram, goal: Mapping[str, Any], calibration: torch.Tensor | None
    ) -> Plan:
        recipe = self.recipe
        return select(
            program,
            **goal,
            score=recipe.score.model_dump(),
            exclude=recipe.exclude,
            include=recipe.include,
            uniform=recipe.uniform,
            align=recipe.align,
            minimum=recipe.minimum,
            aggregate=recipe.aggregate,
            normalize=recipe.normalize,
            seed=recipe.seed,
            calibration=calibration,
        )

    def write(self, program: BaseProgram, plan: Plan, report: Report, target: Target) -> Report:
        """Apply, verify, write and measure."""
        with self.stage("cutting"):
            slim = apply(program, plan)
        with self.stage("verifying"):
            certificate = self._verify(program, plan, slim)
        report = replace(
            report,
            max_abs_error=certificate.max_abs_error,
            verified_in=certificate.dtype,
            notes=(*report.notes, *_little_proof(certificate), *_in_pieces(certificate)),
            outputs=tuple(target.shown(name) for name in target.formats),
        )
        with target.staging() as staged:
            for name in target.formats:
                with self.stage(f"writing {name}"):
                    slim.save(staged / target.name(name), name)
            if "hf" in target.formats:
                report = _form_written(report, staged, self.recipe)
            with self.stage("measuring"):
                onnx = staged / target.name("onnx") if "onnx" in target.formats else None
                report = measured(report, self.recipe, slim, onnx, staged)
            self.progress("putting the files in place")
            plan.save(staged / target.name("plan"))
            (staged / target.name("report")).write_text(report.to_json(), encoding="utf-8")
        return report

    def _verify(self, program: BaseProgram, plan: Plan, slim: Slim | SlimOnnx) -> Certificate:
        wanted = self.recipe.verify
        dtypes = {"auto": None, "float32": torch.float32, "float64": torch.float64}
        certificate = verify(
            program,
            plan,
            slim,
            dtype=dtypes[wanted.dtype],
            tolerance=wanted.tolerance,
            seed=self.recipe.seed,
        )
        certificate.raise_if_failed()
        return certificate


def _in_pieces(certificate: Certificate) -> tuple[str, ...]:
    """What to say of a quantised model, whose rounding makes steps of the smallest differences."""
    if not certificate.steps:
        return ()
    return (
        f"compared at {certificate.steps} quantisation steps, from one to the next; "
        f"all in one, outputs differ by {certificate.drift:.1e}",
    )


def _little_proof(certificate: Certificate) -> tuple[str, ...]:
    """What to say where the inputs would have hidden a wrong cut."""
    if certificate.dense_difference > certificate.tolerance:
        return ()
    return (
        "random inputs show no effect of pruning, so that the comparison with the masked model "
        "says little: verify with inputs of your own",
    )


def _settle(
    recipe: Recipe | Mapping[str, object] | str | Path,
    formats: Sequence[str] | None,
    seed: int | None,
) -> Recipe:
    if isinstance(recipe, str | Path):
        recipe = Recipe.load(recipe)
    data = recipe.model_dump(exclude_unset=True) if isinstance(recipe, Recipe) else dict(recipe)
    if formats is not None:
        data["formats"] = tuple(formats)
    if seed is not None:
        data["seed"] = seed
    return Recipe.parse(data)


def _with_formats(
    recipe: Recipe,
    source: str | Path | torch.nn.Module | BaseProgram,
    output: str | Path | None,
) -> Recipe:
    """The recipe with a format that the source can have, where it asks for none."""
    asked = "formats" in recipe.model_fields_set
    onnx = isinstance(source, OnnxProgram)
    if isinstance(source, str | Path):
        suffix = Path(source).suffix
        onnx = suffix == ".onnx"
        checkpoint = not is_factory(source) and suffix not in (".pt2", ".onnx")
    else:
        checkpoint = isinstance(source, Program) and source.source is not None
    if onnx and asked and recipe.formats != ("onnx",):
        raise _only_onnx(source)
    if onnx:
        return Recipe.parse({**recipe.model_dump(exclude_unset=True), "formats": ("onnx",)})
    if asked and "hf" in recipe.formats and Path(str(source)).suffix == ".pt2":
        raise _no_checkpoint(source)
    if asked or checkpoint:
        return recipe
    suffix = Path(output or "").suffix.removeprefix(".")
    form = suffix if suffix in FORMATS else "pt2"
    return Recipe.parse({**recipe.model_dump(exclude_unset=True), "formats": (form,)})


def _with_score(recipe: Recipe, program: BaseProgram) -> Recipe:
    """The recipe with a score in place of ``auto``.

    The largest activations of language models pass through channels whose weights are small, so
    that magnitude leaves a model that guesses: they are scored on text, wherever there can be one.
    """
    if recipe.score.name != "auto":
        return recipe
    readable = (
        isinstance(program, Program)
        and is_causal(program)
        and tokenizer_of(program) is not None
        and not any(program.weights[name].is_meta for name in sorted(program.trainable)[:1])
    )
    name = "taylor" if readable else "magnitude"
    return Recipe.parse({**recipe.model_dump(exclude_unset=True), "score": name})


def _check_formats(
    formats: Sequence[str],
    program: BaseProgram,
    source: object,
) -> None:
    if not isinstance(program, Program):
        if tuple(formats) != ("onnx",):
            raise _only_onnx(source)
        return
    if "hf" in formats and program.source is None:
        raise _no_checkpoint(source)
    if "onnx-decoder" in formats:
        from graphprune.emit.decoder import precheck

        precheck(program)


def _planned(program: BaseProgram, plan: Plan) -> Slim | SlimOnnx:
    """The slim model before anything is cut."""
    if isinstance(program, OnnxProgram):
        return SlimOnnx(program, plan)
    assert isinstance(program, Program)
    return Slim(program, plan, plan.bind(program))


def _traced(slim: Slim | SlimOnnx) -> Slim:
    """A slim model that another round can trace."""
    if not isinstance(slim, Slim):
        raise RecipeError(
            "an ONNX model is pruned in one round",
            hint="leave rounds out, or prune the PyTorch model and export it",
        )
    return slim


def _only_onnx(source: object) -> EmitError:
    return EmitError(
        "an ONNX model can only be written as ONNX",
        where=_shown(source),
        hint="ask for format onnx and an output that ends in .onnx, or a directory",
    )


def _no_checkpoint(source: object) -> EmitError:
    return EmitError(
        "only a transformers model can be written as a Hugging Face checkpoint",
        where=_shown(source),
        hint="ask for formats pt2 or onnx",
    )


def _shown(source: object) -> str:
    """A source as the report names it: found again from any directory."""
    if not isinstance(source, str | Path):
        return type(source).__name__
    path = file_of(source)
    if not path.exists():
        return str(source)
    name = f":{str(source).rpartition(':')[2]}" if is_factory(source) else ""
    return f"{path.absolute()}{name}"


def _open(
    source: str | Path | torch.nn.Module | BaseProgram,
    example: tuple[Any, ...] | Mapping[str, Any] | None,
    weights: str | Path | None,
) -> BaseProgram:
    if isinstance(source, str | Path):
        return load(source, weights)
    if weights is not None:
        raise LoadError("weights from a file go with module:factory", where=str(weights))
    if isinstance(source, BaseProgram):
        return source
    if example is None:
        raise LoadError(
            "a module needs example inputs",
            where=type(source).__name__,
            hint="pass example=(input, ...) or example={name: input}",
        )
    if isinstance(example, Mapping):
        return trace(source, (), example)
    return trace(source, tuple(example))


def _check_weights(program: BaseProgram) -> None:
    """Refuse weights that are missing or not finite: every number that follows would be wrong."""
    for name in sorted(program.trainable):
        weight = program.weights[name]
        if weight.is_meta:
            raise LoadError(
                "the model has no weights", where=name, hint="only inspect and dry runs need none"
            )
        broken = sum(int((~piece.isfinite()).sum()) for piece in _pieces(weight))
        if broken:
            raise LoadError(
                "a weight is not a finite number",
                where=f"parameter {name}",
                why=f"{broken} of {weight.numel()} are NaN or infinite",
                hint="repair the checkpoint",
            )


def _pieces(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Parts of a tensor, so that what is computed from it isn't as large as it is."""
    rows = weight.detach().reshape(weight.shape or (1,))
    return torch.split(rows, max(1, PIECE * len(rows) // max(1, rows.numel())))


def _native(slim: Slim, recipe: Recipe) -> tuple[bool, tuple[str, ...]]:
    """Whether a plain config can hold the plan; says so before the work starts."""
    from graphprune.emit.hf import precheck

    problems = precheck(slim)
    if not problems:
        return True, ()
    if recipe.native == "require":
        raise EmitError(
            "no native Hugging Face config can hold this plan",
            why="; ".join(problems),
            hint="ask for uniform sizes, for formats pt2 or onnx, or for native: prefer",
        )
    return False, (f"{_SELF_CONTAINED} ({problems[0]})",)


_SELF_CONTAINED = (
    "no native config holds this plan: the checkpoint is self-contained, "
    "for graphprune.load or trust_remote_code=True"
)


def _form_written(report: Report, directory: Path, recipe: Recipe) -> Report:
    """Note it if the checkpoint became self-contained although the shapes would have fitted."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "graphprune" not in config or not report.native:
        return report
    if recipe.native == "require":
        raise EmitError(
            "no native Hugging Face config can hold this plan",
            why="the model class computes other factors from the new sizes",
            hint="ask for formats pt2 or onnx, or for native: prefer",
        )
    return replace(report, native=False, notes=(*report.notes, _SELF_CONTAINED))


def _measures(cost: Cost) -> Measures:
    return Measures(parameters=cost.params, macs=cost.macs, bytes=cost.bytes)


def _kept(slim: Slim | SlimOnnx) -> dict[str, tuple[int, int]]:
    """Units kept and units there were, of every role that loses some."""
    program, units = slim.program, slim.plan.kept_units
    gone = slim.selection.removed_parameters
    kept: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for structure in program.structures:
        if structure.prunable:
            role = structure.role or "other"
            total[role] += structure.size
            if structure.blocks or not gone.issuperset(name for name, _ in structure.members):
                rows = units.get(structure.name, range(structure.size))
                kept[role] += len(rows[0]) if isinstance(rows[0], tuple) else len(rows)
    named = {program.by_name[name].role or "other" for name in units}
    return {role: (kept[role], total[role]) for role in total if role in named}
