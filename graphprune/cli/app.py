"""The command line: ``graphprune compile``, ``sweep``, ``eval`` and the others.

Tables go to stdout, progress and errors to stderr, and ``--json`` prints nothing but JSON, of an
error too. What a user got wrong is one message and exit code 1 (2 of diff, whose 1 says that plans
differ); wrong usage is 2, a condition of --fail-if that holds 3, Ctrl-C 130. torch is imported only
once a command needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from graphprune._version import __version__
from graphprune.cli.compiling import compile, recover
from graphprune.cli.console import orderly_end, quiet, telling, use_threads
from graphprune.cli.diff import diff
from graphprune.cli.failures import fail
from graphprune.cli.options import (
    FailIf,
    IncludePath,
    Json,
    Limit,
    Shots,
    Source,
    TaskBatch,
    Tasks,
    Text,
    Trust,
    Unused,
    Weights,
)
from graphprune.cli.recipes import explain, recipes
from graphprune.cli.reporting import report
from graphprune.cli.shown import show as _show
from graphprune.cli.sweeping import sweep
from graphprune.report.provenance import commanded

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune a neural network: trace, plan, rewrite, verify, write.",
    epilog="""Three to begin with:

    graphprune inspect MODEL

    graphprune compile MODEL -o SLIM --remove ffn=0.25

    graphprune eval SLIM --against MODEL
    """,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("pack")
def _pack(
    source: Annotated[Path, typer.Argument(help="A checkpoint or an .onnx file with zeros.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory, or an .onnx file.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="bitmap, strip_u8, nm24, block or csr; auto: the fastest here, layer by layer.",
        ),
    ] = "bitmap",
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="auto: so many tokens at once; repeatable; default: 1."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    trust: Trust = False,
    unused: Unused = False,
    as_json: Json = False,
) -> None:
    """Write a sparse model anew, without its zeros."""
    with telling() as progress:
        from graphprune.packing import pack

        found = pack(
            source,
            output,
            format=form,
            tokens=tokens or (1,),
            overwrite=overwrite,
            progress=progress,
            trust=trust,
            allow_unused_weights=unused,
        )
    _show(found.to_json() if as_json else found.render())


@app.command("inspect")
def _inspect(
    source: Source,
    why: Annotated[
        str | None, typer.Option(help="Explain every dimension of this parameter.")
    ] = None,
    weights: Weights = None,
    trust: Trust = False,
    unused: Unused = False,
    as_json: Json = False,
) -> None:
    """Show what can be pruned, what a unit of it costs, and what is frozen and why."""
    with telling() as progress:
        progress("loading and tracing")
        from graphprune.frontends import load
        from graphprune.report import inspection

        program = load(source, weights, trust=trust, allow_unused_weights=unused)
        if as_json:
            data: object = {"source": source, **inspection.as_data(program)}
            if why is not None:
                data = inspection.explain(program, why)
            shown: RenderableType = json.dumps(data, indent=2) + "\n"
        elif why is not None:
            shown = "\n".join(inspection.explained(program, why)) + "\n"
        else:
            shown = inspection.as_text(program)
    _show(shown)


@app.command("verify")
def _verify(
    output: Annotated[Path, typer.Argument(help="What `graphprune compile` wrote.")],
    source: Annotated[
        str | None, typer.Option(help="The dense model; default: the one in the report.")
    ] = None,
    weights: Weights = None,
    trust: Trust = False,
    unused: Unused = False,
    as_json: Json = False,
) -> None:
    """Compare a written model with the masked dense one again, from the files alone."""
    with telling() as progress:
        from graphprune.pipeline.written.artefacts import verify_output

        found = verify_output(
            output,
            source,
            weights,
            progress=progress,
            trust=trust,
            allow_unused_weights=unused,
        )
    sys.stderr.writelines(f"note: {note}\n" for note in found.notes)
    lines = [
        f"{name}: verified: outputs match the masked model within {error:.1e}\n"
        for name, error in found.errors.items()
    ]
    _show(json.dumps(found.errors, indent=2) + "\n" if as_json else "".join(lines))


@app.command("eval")
def _eval(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, hub id, .pt2, .onnx or module:factory.")
    ],
    against: Annotated[str | None, typer.Option(help="Another model beside it.")] = None,
    text: Text = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens, open sizes of ONNX files; default: 512 of text, 128 for latency."
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of each text; default: all, of ours 64.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads within an operator.")] = None,
    fail_if: FailIf = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    shots: Shots = None,
    limit: Limit = None,
    batch: TaskBatch = None,
    trust: Trust = False,
    unused: Unused = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, latency, parameters and size; or, with --tasks, scores on benchmarks.

    Multiply-accumulates and latency are of one sample. With --against, calls of both models are
    timed in turns, and the share of the ideal speed-up is the ratio of their times divided by the
    ratio of their multiply-accumulates. Where text suits them, their predictions are compared too.
    """
    sources = [model] if against is None else [against, model]
    of_tasks = {
        "--include-path": include_path, "--num-fewshot": shots, "--limit": limit,
        "--batch-size": batch,
    }  # fmt: skip
    of_text = {"--text": text, "--fail-if": fail_if, "--length": length, "--windows": windows}
    _check_unused(of_tasks if tasks is None else of_text, with_tasks=tasks is not None)
    if tasks is not None:
        names = [name for word in tasks for name in word.split(",") if name]
        if not names:
            raise typer.BadParameter("--tasks names none: write --tasks hellaswag,arc_easy")
        with telling() as progress:
            from graphprune.measure.tasks import measure_tasks

            use_threads(threads)
            scores = measure_tasks(
                sources,
                names,
                include=include_path,
                shots=shots,
                limit=limit,
                batch=batch or 1,
                progress=progress,
                trust=trust,
                allow_unused_weights=unused,
            )
        _show(scores.to_json() if as_json else scores.render())
        return
    with telling() as progress:
        from graphprune.quality.conditions import check_evaluation, read_all

        conditions = read_all(fail_if or ())
        from graphprune.measure.compare import measure_sources

        found = measure_sources(
            sources,
            text or (),
            length,
            windows,
            progress,
            threads,
            conditions=conditions,
            trust=trust,
            allow_unused_weights=unused,
        )
    _show(found.to_json() if as_json else found.render())
    check_evaluation(conditions, found.models, found.quality)


def _check_unused(options: Mapping[str, object], *, with_tasks: bool) -> None:
    """Refuse options that would be left aside: scores of tasks have other ones than text has."""
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(
                f"--tasks doesn't go with {name}" if with_tasks else f"{name} goes with --tasks"
            )


app.command("compile")(compile)
app.command("recover")(recover)
app.command("diff")(diff)
app.command("sweep")(sweep)
app.command("report")(report)
app.command("recipes")(recipes)
app.command("explain")(explain)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    debug = bool(os.environ.get("GRAPHPRUNE_DEBUG"))
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with orderly_end(), commanded(given), contextlib.nullcontext() if debug else quiet():
            app(given, prog_name="graphprune")
    except Exception as error:
        if debug:
            raise
        fail(error, as_json="--json" in given)
    sys.exit(0)


if __name__ == "__main__":
    main()
