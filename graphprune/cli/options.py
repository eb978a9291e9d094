"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="A checkpoint, hub id, .pt2 or .onnx file, module:factory or file.py:factory."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="A safetensors state dict for the factory's module.")
]
Unused = Annotated[
    bool,
    typer.Option(
        "--allow-unused-weights",
        help="Leave out weights of a checkpoint that its model doesn't use.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Let a checkpoint or a .pt2 file run code of its own, once you've read it."
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="A text or .jsonl file to measure on; repeatable. Default: held-out data, or our own.",
    ),
]
DataSource = Annotated[
    str | None,
    typer.Option(
        "--data", help="Calibration data, if it isn't the text: see docs/calibration-data.md."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Don't prune parameters matching this pattern (a glob or selector); repeatable."
    ),
]
Include = Annotated[
    list[str] | None, typer.Option(help="Prune only parameters matching this pattern; repeatable.")
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="CONDITION",
        help="Exit with 3, and write nothing, if this holds: 'perplexity>+50%', 'agreement<0.9', "
        "'parameters>100M'; also kl, macs and bytes. Repeatable.",
    ),
]
Formats = Annotated[
    list[str] | None, typer.Option("--format", help="hf, onnx, onnx-decoder or pt2; repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed; default: 0.")]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where to compute: auto (the default), cpu, cuda, cuda:1, …"),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option("--memory", metavar="BYTES", help="Of the device, at most: 20G; default: all."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of the processor; default: OMP_NUM_THREADS, or all."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output, or what an interrupted run left.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from where an interrupted run stopped.")
]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="REPO",
        help="Upload the checkpoint to this repository of the Hugging Face hub, if all went well.",
    ),
]
Events = Annotated[
    Path | None,
    typer.Option(
        "--events", metavar="FILE", help="Write what is done as JSON Lines, for trackers."
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAME,...",
        help="Score tasks of lm-evaluation-harness instead: hellaswag,arc_easy; repeatable.",
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option("--include-path", metavar="DIR", help="Tasks: a folder of your own task files."),
]
Shots = Annotated[
    int | None,
    typer.Option("--num-fewshot", min=0, help="Tasks: solved examples; default: the task's own."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Tasks: samples of each; default: all.")]
TaskBatch = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Tasks: samples at once; default: 1.")
]
