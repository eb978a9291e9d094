"""The command line: ``graphprune compile | pack | inspect | verify | eval | diff``.

Tables go to stdout, progress and errors to stderr, and ``--json`` prints nothing but JSON. What a
user got wrong is one message and exit code 1 (2 of diff, whose 1 says that plans differ); wrong
usage is 2, a condition of --fail-if that holds 3, Ctrl-C 130. torch is imported only once a command
needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from graphprune._version import __version__
from graphprune.cli.diff import diff
from graphprune.cli.options import FailIf, Json, Source, Text, Trust, Unused, Weights
from graphprune.cli.shown import show as _show
from graphprune.errors import GraphPruneError
from graphprune.progress import Note
from graphprune.report.provenance import commanded

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune a neural network: trace, plan, rewrite, verify, write.",
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


@app.command("compile")
def _compile(
    source: Source,
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; flags override it.")] = None,
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
    exclude: Annotated[
        list[str] | None, typer.Option(help="Keep what this glob or selector means whole.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Prune only what this glob or selector means.")
    ] = None,
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
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="hf, onnx, onnx-decoder or pt2; repeatable."),
    ] = None,
    text: Text = None,
    data: Annotated[
        str | None,
        typer.Option(help="Calibration data, if it isn't the text: see docs/calibration-data.md."),
    ] = None,
    weights: Weights = None,
    unused: Unused = False,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    fail_if: FailIf = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the output, or what an interrupted run left."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from where an interrupted run stopped.")
    ] = False,
    trust: Trust = False,
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
        "exclude": exclude,
        "include": include,
        "uniform": uniform,
        "align": align,
        "formats": formats,
        "text": text,
        "data": data,
        "seed": seed,
        "fail_if": fail_if,
    }
    with _noted(), _progress() as progress:
        from graphprune.recipe.recipe import Recipe

        settled = Recipe.from_flags(recipe, goals | options)
        asked: dict[str, Any] = {
            "weights": weights,
            "dry_run": dry_run,
            "overwrite": overwrite,
            "resume": resume,
            "trust": trust,
            "progress": progress,
        }
        from graphprune.preflight.checks import check_request

        check_request(source, settled, output, recipe, **asked)  # torch takes seconds to import
        from graphprune.pipeline import compiler

        report = compiler.compile(source, settled, output, **asked, allow_unused_weights=unused)
    _show(report.to_json() if as_json else report.render())


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
    with _progress() as progress:
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
    with _progress() as progress:
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
    with _progress() as progress:
        from graphprune.pipeline.artefacts import verify_output

        found = verify_output(
            output,
            source,
            weights,
            progress=progress,
            trust=trust,
            allow_unused_weights=unused,
        )
    sys.stderr.writelines(f"note: {note}\n" for note in found.notes)
    lines = [f"{name}: equals the masked model within {error:.1e}\n" for name, error in
             found.errors.items()]  # fmt: skip
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
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads within an operator, for latency.")
    ] = None,
    fail_if: FailIf = None,
    trust: Trust = False,
    unused: Unused = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, latency, parameters and size.

    Multiply-accumulates and latency are of one sample. With --against, calls of both models are
    timed in turns, and the share of the ideal speed-up is the ratio of their times divided by the
    ratio of their multiply-accumulates. Where text suits them, their predictions are compared too.
    """
    sources = [model] if against is None else [against, model]
    with _progress() as progress:
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


app.command("diff")(diff)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the present stage on stderr: a spinner, or a line in a log.

    Files that are cut short while they are mapped end the command by an error meanwhile.
    """
    from rich.console import Console

    from graphprune.files.sources import reading

    console = Console(stderr=True)
    if not console.is_terminal:
        with reading():
            yield _between(
                console, lambda stage: console.print(f"{stage} ...", markup=False, highlight=False)
            )
        return
    with reading(), console.status("starting") as status:
        yield _between(console, lambda stage: status.update(f"{stage} ..."))


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """Show the notes of an interruption, which click and Python end without a message."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as stopped:
        for note in getattr(stopped, "__notes__", ()):
            sys.stderr.write(f"{note}\n")
        raise


def _between(console: Console, show: Callable[[str], None]) -> Callable[[str], None]:
    """Show a stage, or print a note, unless the program has been told to stop."""

    def begin(stage: str) -> None:
        if _signals:
            _stop(_signals[0])
        if isinstance(stage, Note):
            console.print(f"note: {stage}", markup=False, highlight=False, soft_wrap=True)
        else:
            show(stage)

    return begin


_signals: list[int] = []
"""Signals to stop that have come. What they raise is lost if it comes up while Python collects
garbage, so that every stage looks here too."""

_ENDS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Let signals unwind the stack: SIGTERM's default action would leave a half-written output."""

    def stop(number: int, _: object) -> None:
        _signals.append(number)
        _stop(number)

    wanted = [one for one in _ENDS if signal.getsignal(one) != signal.SIG_IGN]  # as nohup has it
    before = {one: signal.signal(one, stop) for one in wanted}
    try:
        yield
    finally:
        _signals.clear()
        for one, handler in before.items():
            signal.signal(one, handler)


def _stop(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries' warnings, logs and progress bars off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


_NO_MEMORY = """there is not enough memory
  why: something had to be larger than what is free: the model, an input, or calibration data
  do: close other programs, or give a smaller model or less data"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    debug = bool(os.environ.get("GRAPHPRUNE_DEBUG"))
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        with _orderly_end(), commanded(given), contextlib.nullcontext() if debug else _quiet():
            app(given, prog_name="graphprune")
    except GraphPruneError as error:
        if debug:
            raise
        _fail("\n".join([str(error), *_notes(error)]), error)
    except MemoryError as error:
        if debug:
            raise
        _fail("\n".join([_NO_MEMORY, *_notes(error)]), error)
    except Exception as error:
        if debug:
            raise
        what = " ".join(str(error).split())[:300] or "no message"
        _fail(
            "\n".join([
                f"internal error: {type(error).__name__}: {what}",
                "  do: set GRAPHPRUNE_DEBUG=1 for the traceback, and report it",
                *_notes(error),
            ]),
            error,
        )  # fmt: skip
    sys.exit(0)


def _notes(error: BaseException) -> list[str]:
    return [f"  note: {note}" for note in getattr(error, "__notes__", ())]


def _fail(message: str, error: Exception) -> NoReturn:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False, soft_wrap=True)
    sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
