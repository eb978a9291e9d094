"""The command line: ``graphprune compile | inspect | verify | eval``.

Tables go to stdout, progress and errors to stderr, and ``--json`` prints nothing but JSON. What a user
got wrong is one message and exit code 1; wrong usage is 2, Ctrl-C 130. torch is imported only once a
command needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from graphprune._version import __version__
from graphprune.errors import GraphPruneError, PlanError

if TYPE_CHECKING:
    from rich.console import Console

    from graphprune.program import Program, Structure
    from graphprune.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Structurally prune a neural network: trace, plan, rewrite, verify, write.",
)

Source = Annotated[str, typer.Argument(help="A checkpoint directory, hub id or .pt2 file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Text = Annotated[
    str | None, typer.Option("--text", help="A text or .jsonl file; default: built-in English.")
]


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
        list[str] | None, typer.Option(help="Fraction to remove by role: ffn=0.25, heads=1/3.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Budget: params=0.7, macs=0.5 or bytes=100M.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Exact sizes: hidden=2048, layers=24.")
    ] = None,
    score: Annotated[str | None, typer.Option(help="magnitude, taylor or random.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Keep what touches a parameter of this glob whole.")
    ] = None,
    uniform: Annotated[
        bool | None, typer.Option("--uniform/--global", help="Per layer, or over all layers.")
    ] = None,
    align: Annotated[int | None, typer.Option(help="Kept sizes are multiples of this.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="hf, onnx or pt2; repeatable.")
    ] = None,
    text: Text = None,
    plan: Annotated[Path | None, typer.Option(help="Replay a saved plan.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Json = False,
) -> None:
    """Prune a model and write it."""
    if output is None and not dry_run:
        raise typer.BadParameter("give an output with -o, or --dry-run")
    goals: dict[str, object] = {"remove": remove, "target": target, "shape": shape}
    if plan is not None and any(goals.values()):
        raise typer.BadParameter("--plan replays a plan; it takes no --remove, --target or --shape")
    if plan is None and recipe is None and not any(goals.values()):
        raise typer.BadParameter("say what to remove: a recipe, --remove, --target or --shape")
    settled = _recipe(
        recipe,
        {
            **(goals if plan is None else {"shape": ["ffn=1"]}),
            "score": score,
            "exclude": exclude,
            "uniform": uniform,
            "align": align,
            "formats": formats,
            "seed": seed,
        },
        text,
    )
    with _progress() as progress:
        import graphprune.compiler

        report = graphprune.compiler.compile(
            source,
            settled,
            output,
            dry_run=dry_run,
            progress=progress,
            plan=plan,
            overwrite=overwrite,
        )
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        _stdout().print(report.render())


@app.command("inspect")
def _inspect(
    source: Source,
    why: Annotated[
        str | None, typer.Option(help="Explain every dimension of this parameter.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what can be pruned, what a unit of it costs, and what is frozen and why."""
    with _progress() as progress:
        progress("loading and tracing")
        import graphprune

        program = graphprune.load(source)
        structures = tuple(program.structures)
    if why is not None:
        rows = _explain(program, why)
        lines = [f"{why}[{row['dimension']}]: {row['text']}" for row in rows]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n" if as_json else "\n".join(lines) + "\n")
    elif as_json:
        fields = ("name", "role", "size", "prunable", "reason", "params", "macs", "members")
        cost = program.cost()
        data = {
            "source": source,
            "fingerprint": program.fingerprint,
            "params": cost.params,
            "macs": cost.macs,
            "bytes": cost.bytes,
            "structures": [{key: getattr(one, key) for key in fields} for one in structures],
        }
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        _print_structures(_stdout(), program)


@app.command("verify")
def _verify(
    output: Annotated[Path, typer.Argument(help="What `graphprune compile` wrote.")],
    source: Annotated[
        str | None, typer.Option(help="The dense model; default: the one in the report.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a written model with the masked dense one again, from the files alone."""
    with _progress() as progress:
        import graphprune.compiler

        results = graphprune.compiler.verify_output(output, source, progress=progress)
    if as_json:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
        return
    for name, error in results.items():
        typer.echo(f"{name}: equals the masked dense model within {error:.1e}")


@app.command("eval")
def _eval(
    model: Annotated[str, typer.Argument(help="A checkpoint directory, hub id or .onnx file.")],
    against: Annotated[str | None, typer.Option(help="Another model beside it.")] = None,
    text: Text = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows; default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, latency, parameters and size."""
    with _progress() as progress:
        from dataclasses import asdict

        from graphprune import compiler, report

        names = [model] if against is None else [against, model]
        measured = compiler.measure(names, text or "builtin", length, windows, progress=progress)
    if as_json:
        data = {name: asdict(one) for name, one in zip(names, measured, strict=True)}
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
        return
    second = measured[1] if against is not None else None
    titles = (Path(names[0]).name, Path(names[-1]).name)
    _stdout().print(report.comparison(measured[0], second, titles))


def _recipe(path: Path | None, flags: dict[str, object], text: str | None) -> Recipe:
    from graphprune.recipe import Recipe, read_yaml

    base = None if path is None else read_yaml(path)
    if text is not None:
        section = base.get("calibration") if isinstance(base, dict) else None
        flags["calibration"] = {**(section if isinstance(section, dict) else {}), "text": text}
    return Recipe.from_flags(base, flags)


def _explain(program: Program, parameter: str) -> list[dict[str, Any]]:
    """Says for each dimension of a parameter what it belongs to, or why it cannot be pruned."""
    if parameter not in program.parameters:
        close = difflib.get_close_matches(parameter, program.parameters, n=3, cutoff=0.4)
        raise PlanError(
            f"The model has no parameter '{parameter}'.",
            hint=f"did you mean {' or '.join(close)}?" if close else "see `inspect --json`",
        )
    rows: list[dict[str, Any]] = []
    for dimension, size in enumerate(program.parameters[parameter]):
        touching = [one for one in program.structures if (parameter, dimension) in one.members]
        parts = [
            f"{one.name} ({one.role}, {one.size} units)"
            if one.prunable
            else f"frozen: {one.reason}"
            for one in touching
        ]
        rows.append(
            {
                "dimension": dimension,
                "size": size,
                "structures": [one.name for one in touching],
                "text": "; ".join(parts) or "no structure",
            }
        )
    return rows


def _print_structures(console: Console, program: Program) -> None:
    """Prints one row for structures that differ only in the layer, then the frozen by reason."""
    from rich.table import Table

    cost = program.cost()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("role", "structures"):
        table.add_column(title, overflow="fold")
    for title in ("units", "params/unit", "MACs/unit"):
        table.add_column(title, justify="right")
    prunable = [one for one in program.structures if one.prunable]
    for group in _alike(prunable, lambda one: (one.role, one.size, one.params, one.macs)):
        first = group[0]
        numbers = (f"{value:,}" for value in (first.size, first.params, first.macs))
        table.add_row(first.role, _span(group), *numbers)
    console.print(f"{cost.params:,} parameters, {cost.macs:,} MACs, {cost.bytes:,} bytes")
    console.print(table)
    frozen = [one for one in program.structures if not one.prunable]
    if frozen:
        console.print("frozen:", style="bold")
    for group in _alike(frozen, lambda one: (one.reason,), by_name=False):
        members = sorted({name for one in group for name, _ in one.members})
        shown = ", ".join(members[:3]) + (f" and {len(members) - 3} more" if members[3:] else "")
        console.print(f"  {group[0].reason}: {shown}", markup=False, highlight=False)


def _alike(
    structures: Sequence[Structure],
    key: Callable[[Structure], tuple[object, ...]],
    by_name: bool = True,
) -> list[list[Structure]]:
    """Groups structures with equal keys (and names but for their numbers), in first-seen order."""
    groups: dict[tuple[object, ...], list[Structure]] = {}
    for one in structures:
        pattern = re.sub(r"\d+", "*", one.name) if by_name else ""
        groups.setdefault((pattern, *key(one)), []).append(one)
    return list(groups.values())


def _span(group: Sequence[Structure]) -> str:
    """Names a group: ``model.layers.{0..29}.mlp``."""
    numbers = [re.findall(r"\d+", one.name) for one in group]
    varying = [place for place in zip(*numbers, strict=True) if len(set(place)) > 1]
    if len(group) == 1:
        return group[0].name
    if len(varying) != 1:
        return f"{re.sub(r'[0-9]+', '*', group[0].name)} ({len(group)})"
    values = sorted(int(number) for number in varying[0])
    whole = values == list(range(values[0], values[-1] + 1))
    span = f"{values[0]}..{values[-1]}" if whole else ",".join(map(str, values))
    places = iter(zip(*numbers, strict=True))
    return re.sub(
        r"\d+",
        lambda match: f"{{{span}}}" if len(set(next(places))) > 1 else match[0],
        group[0].name,
    )


def _stdout() -> Console:
    from rich.console import Console

    return Console(soft_wrap=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows the present stage on stderr: a spinner, or a line in a log."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: console.print(f"{stage} ...", markup=False, highlight=False)
        return
    with console.status("starting") as status:
        yield lambda stage: status.update(f"{stage} ...")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps libraries' warnings, logs and progress bars off the terminal."""
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its code."""
    from rich.console import Console

    debug = bool(os.environ.get("GRAPHPRUNE_DEBUG"))
    # The default action of SIGTERM would leave a half-written output behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with contextlib.nullcontext() if debug else _quiet():
            app(list(arguments) if arguments is not None else None, prog_name="graphprune")
    except GraphPruneError as error:
        if debug:
            raise
        message = str(error)
    except Exception as error:
        if debug:
            raise
        what = " ".join(str(error).split())[:500] or "no message"
        message = f"Internal error: {type(error).__name__}: {what}\n  do: set GRAPHPRUNE_DEBUG=1"
        message += " for the traceback, and report it"
    first, _, rest = message.partition("\n")
    console = Console(stderr=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(first + ("\n" + rest if rest else ""), markup=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
