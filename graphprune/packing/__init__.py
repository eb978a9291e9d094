"""Files whose weights take no space for zeros.

    graphprune pack SPARSE -o PACKED          # SPARSE: a checkpoint or an ONNX file with zeros
    model = graphprune.runtime.model("PACKED")

The formats are those of `graphprune.kernels`; docs/kernels.md tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from graphprune.emit.places import place_of
from graphprune.errors import EmitError, LoadError
from graphprune.files import claimed
from graphprune.files.paths import usable
from graphprune.files.refusals import refused
from graphprune.files.sources import reading
from graphprune.packing.report import Layer, Packing
from graphprune.runtime.formats import AUTO, check_tokens

Progress = Callable[[str], None]


def pack(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "bitmap",
    tokens: Sequence[int] = (1,),
    overwrite: bool = False,
    progress: Progress | None = None,
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> Packing:
    """Write a model anew without the zeros of its linear layers.

    A Hugging Face checkpoint becomes a directory with ``packed.safetensors``, which
    `graphprune.load` and `graphprune.runtime.model` open; an ONNX file becomes one with nodes
    ``graphprune::BitmapLinear``, which any ONNX Runtime opens, and `graphprune.runtime.session`
    runs with our kernel.

    Args:
        source: a checkpoint directory or an ``.onnx`` file, whose weights have zeros.
        output: a directory, or an ``.onnx`` file.
        format: of every layer that it makes smaller, or ``auto``: for each layer the one that is
            the fastest on this machine, which may be dense. ONNX files have ``bitmap`` or dense
            weights.
        tokens: for ``auto``: numbers of tokens at once that layers are timed with.
        overwrite: replace the output.
        progress: called with the names of stages.
        trust: whether a checkpoint may run code of its own.
        allow_unused_weights: see `graphprune.load`.

    Returns:
        What was packed, and how many bytes it takes.

    Raises:
        LoadError: the source is missing or damaged, or no file of weights.
        EmitError: nothing gets smaller, the output is there, or can't be written.
    """
    source, output = usable(source), usable(output, EmitError)
    if not source.exists():
        raise LoadError("no such file or directory", where=str(source), hint="check the path")
    single = source.is_file()
    with refused(output):  # a name may be too long
        place = place_of(output, single=single)
    _check_overwritten(source, output)
    counts = check_tokens(tokens)
    if single and source.suffix != ".onnx":
        raise LoadError(
            "only checkpoints and ONNX files can be packed",
            where=str(source),
            hint="give a directory that save_pretrained wrote, or an .onnx file",
        )
    if not single and place.is_file():
        raise EmitError(
            "a checkpoint is packed as a directory, and the output is none",
            where=str(output),
            hint="choose another output",
        )
    with claimed(place, overwrite=overwrite) as claim, reading([source]) as sources:
        if place.exists() and not overwrite:
            raise EmitError(
                "the output is there already",
                where=str(output),
                hint="choose another output, or ask to overwrite it",
            )
        told = sources.checking(progress or (lambda _: None))
        if single:
            from graphprune.packing.onnx import pack_onnx

            return pack_onnx(source, output, claim, format, counts, told)
        from graphprune.packing.checkpoint import pack_checkpoint

        return pack_checkpoint(
            source,
            output,
            claim,
            format,
            counts,
            told,
            trust=trust,
            allow_unused_weights=allow_unused_weights,
        )


def _check_overwritten(source: Path, output: Path) -> None:
    """Refuse to replace a directory that holds anything but a checkpoint, or the source.

    Raises:
        EmitError: it does.
    """
    inside, outside = source.resolve(), output.resolve()
    if outside != inside and (outside in inside.parents or inside in outside.parents):
        raise EmitError(
            "source and output lie in one another",
            where=str(output),
            hint="choose another output",
        )
    if output.is_dir() and not (output / "config.json").is_file():
        raise EmitError(
            "the output is a directory with something else in it",
            where=str(output),
            why="it has no config.json",
            hint="choose another output",
        )


__all__ = ["AUTO", "Layer", "Packing", "pack"]
