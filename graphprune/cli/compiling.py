"""``graphprune compile`` and ``graphprune recover``: what writes a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli.console import noted, sharing, telling, use_threads
from graphprune.cli.events import recorded
from graphprune.cli.options import (
    DataSource,
    Device,
    DeviceMemory,
    DryRun,
    Events,
    Exclude,
    FailIf,
    Formats,
    Include,
    Json,
    Overwrite,
    PushTo,
    Resume,
    Seed,
    Source,
    Text,
    Threads,
    Trust,
    Unused,
    Weights,
)
from graphprune.cli.shown import show
from graphprune.progress import Note
from graphprune.ranks.environment import own_rank

if TYPE_CHECKING:
    from graphprune.recipe.recipe import Recipe


def compile(
    source: Source,
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A YAML recipe, or the name of a shipped one; flags override it."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory, or a .pt2 or .onnx file.")
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="Fraction to remove: ffn=0.25, heads=1/3, model.layers.4.*/ffn=0.5."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Budget: params=0.7, macs=0.5 or bytes=100M.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Exact sizes: hidden=2048, layers=24.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Replay a saved plan.")] = None,
    sparsify: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Make single weights zero: magnitude, wanda, ria, sparsegpt, alps or dsnot.",
        ),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Fraction of the weights that becomes zero: 50%, 0.5.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Instead: n weights kept of every m, such as 2:4.")
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(help="strip: equal counts in every 256 inputs, for GPUs; default: none."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="How layers share the sparsity: uniform, owl, sensitivity or global."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="sparsegpt: round kept weights to so many bits too.")
    ] = None,
    reference: Annotated[
        bool | None,
        typer.Option(
            "--reference/--no-reference",
            help="Zeros: have later layers make up for what the dense model did.",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="auto (the default), magnitude, taylor, element-mix, flap, minitron, …"),
    ] = None,
    repair: Annotated[
        str | None, typer.Option(help="auto (the default), none, bias, reconstruct, …")
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="fast, usual, balanced (matches blocks) or best (trains as well). By default "
            "usual; language models train a little after deep cuts."
        ),
    ] = None,
    exclude: Exclude = None,
    include: Include = None,
    uniform: Annotated[
        bool | None, typer.Option("--uniform/--global", help="Per layer, or over all layers.")
    ] = None,
    align: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBER|NAME",
            help="Widths are multiples of this: 64, gpu (64), ort (16), gguf (256), ffn=gguf.",
        ),
    ] = None,
    formats: Formats = None,
    text: Text = None,
    data: DataSource = None,
    weights: Weights = None,
    unused: Unused = False,
    seed: Seed = None,
    device: Device = None,
    memory: DeviceMemory = None,
    threads: Threads = None,
    fail_if: FailIf = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    trust: Trust = False,
    push_to: PushTo = None,
    events: Events = None,
    as_json: Json = False,
) -> None:
    """Prune a model and write it."""
    goals: dict[str, object] = {"remove": remove, "target": target, "shape": shape, "plan": plan}
    masks = {
        "method": sparsify,
        "sparsity": sparsity,
        "pattern": pattern,
        "balance": balance,
        "budget": budget,
        "bits": bits,
        "reference": reference,
    }
    if recipe is None and not any(goals.values()) and sparsify is None:
        raise typer.BadParameter(
            "say what to remove: a recipe, --remove, --target, --shape, --plan or --sparsify"
        )
    if output is None and not dry_run:
        raise typer.BadParameter("give an output with -o, or --dry-run")
    options: dict[str, object] = {
        "sparsify": masks,
        "score": score,
        "repair": repair,
        "effort": effort,
        "exclude": exclude,
        "include": include,
        "uniform": uniform,
        "align": align,
        "formats": formats,
        "text": text,
        "data": data,
        "seed": seed,
        "device": device,
        "memory": memory,
        "fail_if": fail_if,
    }
    flags = goals | options
    _carry_out(source, recipe, flags, output, {
        "weights": weights,
        "dry_run": dry_run,
        "overwrite": overwrite,
        "resume": resume,
        "trust": trust,
    }, unused, threads, push_to, events, as_json)  # fmt: skip


def recover(
    source: Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory, or a .pt2 file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="What to train on: see docs/calibration-data.md."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="The dense model, which the losses kd and values compare with."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published settings: llm-pruner; other options go first.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="full (the default), norms or lora; frozen trains nothing.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="ce, kd, kd+ce, hidden or values; default: by the model.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Tokens to train on: 64000, 64K.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows in a step.")] = None,
    text: Text = None,
    formats: Formats = None,
    weights: Weights = None,
    unused: Unused = False,
    seed: Seed = None,
    device: Device = None,
    memory: DeviceMemory = None,
    threads: Threads = None,
    fail_if: FailIf = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    trust: Trust = False,
    push_to: PushTo = None,
    events: Events = None,
    as_json: Json = False,
) -> None:
    """Train what pruning has left of a model, with its zeros held, and write it."""
    if output is None and not dry_run:
        raise typer.BadParameter("give an output with -o, or --dry-run")
    wanted = {
        "teacher": teacher,
        "preset": preset,
        "train": train,
        "loss": loss,
        "tokens": tokens,
        "lr": lr,
        "batch": batch,
    }
    flags: dict[str, object] = {
        "recover": {name: value for name, value in wanted.items() if value is not None} or True,
        "formats": formats,
        "text": text,
        "data": data,
        "seed": seed,
        "device": device,
        "memory": memory,
        "fail_if": fail_if,
    }
    _carry_out(source, None, flags, output, {
        "weights": weights,
        "dry_run": dry_run,
        "overwrite": overwrite,
        "resume": resume,
        "trust": trust,
    }, unused, threads, push_to, events, as_json)  # fmt: skip


def _carry_out(
    source: str,
    recipe: Path | None,
    flags: dict[str, object],
    output: Path | None,
    asked: dict[str, Any],
    unused: bool,
    threads: int | None,
    push_to: str | None,
    events: Path | None,
    as_json: bool,
) -> None:
    """Compile, push what came out if that is asked for, and show the report.

    Where several processes share the work, the first one alone pushes and tells.
    """
    command = "recover" if "recover" in flags else "compile"
    first = own_rank() == 0
    with (
        recorded(events if first else None, command) as told,
        noted(),
        telling() as show_stage,
        sharing(),
    ):
        progress = told.following(show_stage)
        from graphprune.recipe.recipe import Recipe

        settled = Recipe.from_flags(recipe, flags)
        from graphprune.preflight.checks import check_request

        # torch takes seconds to import
        use_threads(threads)
        check_request(source, settled, output, recipe, **asked, progress=progress)
        if push_to is not None:
            _check_push(push_to, source, settled, output, dry_run=asked["dry_run"])
        from graphprune.pipeline import compiler

        report = compiler.compile(
            source,
            settled,
            output,
            **asked,
            progress=progress,
            allow_unused_weights=unused,
            recipe_file=recipe,
        )
        if push_to is not None and output is not None and first:
            from graphprune.emit.hub import push

            progress(Note(f"pushed to {push(output, push_to, progress)}"))
        told.tell("result", report=json.loads(report.to_json()))
    if first:
        show(report.to_json() if as_json else report.render())


def _check_push(
    repository: str, source: str, recipe: Recipe, output: Path | None, *, dry_run: bool
) -> None:
    """Refuse a push that can't work, before anything is loaded."""
    from graphprune.emit.formats import with_formats
    from graphprune.emit.hub import check_push

    formats = with_formats(recipe, source, output).formats
    single = output is not None and output.suffix in (".pt2", ".onnx")
    written = formats if not single else (str(output)[-4:].strip("."),)
    check_push(repository, written, None if dry_run else output)
