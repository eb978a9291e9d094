"""Images as a model reads them: by the checkpoint's own image processor, or scaled and cropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.signature import Input
from graphprune.calibration.sources.contents import File
from graphprune.calibration.sources.decoding import PIXELS, check_pixels, decoded
from graphprune.calibration.sources.section import Calibration
from graphprune.checkpoints.own_code import open_part
from graphprune.errors import LoadError

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 224
"""Pixels of a side, where the model leaves it open and the recipe says nothing."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of the channels of ImageNet, which most models of images are trained with."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def image_input(inputs: Sequence[Input]) -> Input | None:
    """The input that images are for: the only floating one of four dimensions."""
    found = [
        i for i in inputs if len(i.shape) == 4 and i.dtype is not None and i.dtype.is_floating_point
    ]
    return found[0] if len(found) == 1 else None


def load_images(
    files: Sequence[File], program: BaseProgram, given: Input, wanted: Calibration
) -> tuple[Tensor, tuple[str, ...]]:
    """Images as one tensor.

    Args:
        files: the images.
        program: whose checkpoint may have an image processor; mean, std or size in `wanted` are
            used instead of it.
        given: the input that they are for.
        wanted: has the options.

    Returns:
        ``[images, channels, height, width]``, or with channels last as the input has them; and
        what there is to say of it.

    Raises:
        LoadError: Pillow is missing, an image can't be read (the file is named), or what comes out
            has another size than the model's input.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise LoadError(
            "images are read with Pillow, which is not installed",
            hint="pip install 'graphprune[data]'",
        ) from None
    channels, last = _channels(given)
    own = wanted.size is None and wanted.mean is None and wanted.std is None
    processor = _processor(program) if own else None
    made: Callable[[Image], Tensor]
    notes: tuple[str, ...] = ()
    if processor is not None:
        made = _by_processor(processor, given.name)
    else:
        made = plain = _Plain(given, channels, last, wanted)
        notes = plain.notes
    shape = given.shape[1:]
    found = []
    for file in files:
        source = decoded(file, _MODES[channels])
        if processor is not None:
            _check_scaled(source, given, last, file.name)
        try:
            image = made(source)
        except LoadError as error:
            raise LoadError(error.what, where=file.name, why=error.why, hint=error.hint) from None
        if last and processor is not None:
            image = image.permute(1, 2, 0)
        if any(s is not None and s != own for s, own in zip(shape, image.shape, strict=True)):
            raise LoadError(
                "an image doesn't have the size that the model was traced with",
                where=file.name,
                why=f"{list(image.shape)} after the image processor, {list(shape)} in the trace",
                hint="set size, mean and std in the recipe, or trace the model with this size",
            )
        found.append(image)
    return torch.stack(found), notes


def _check_scaled(image: Image, given: Input, last: bool, name: str) -> None:
    """Refuse an image that a processor would make much longer than it has to be.

    Most scale the shorter side to what the model reads, and crop then. They hold floats.

    Raises:
        LoadError: it is very long, or very high.
    """
    sides = given.shape[1:3] if last else given.shape[2:]
    shorter = max(side or SIZE for side in sides)
    longer = -(-shorter * max(image.size) // min(image.size))
    told = f" when the shorter side of {image.width} x {image.height} is scaled to {shorter}"
    check_pixels(longer, shorter, name, told, PIXELS // 4)


def _channels(given: Input) -> tuple[int, bool]:
    """How many channels, and whether they are last."""
    for place, last in ((1, False), (3, True)):
        count = given.shape[place]
        if count in _MODES:
            return count, last
    raise LoadError(
        "the model's input is no image",
        where=f"input {given.name}",
        why=f"its sizes are {['?' if s is None else s for s in given.shape]}, without a dimension "
        "of 1, 3 or 4 channels",
        hint="give arrays: a .npy or .npz file",
    )


class _Plain:
    """Scales the shorter side, crops the middle, and normalises."""

    def __init__(self, given: Input, channels: int, last: bool, wanted: Calibration) -> None:
        height, width = given.shape[1:3] if last else given.shape[2:]
        open_size = wanted.size or SIZE
        self._last = last
        self._height, self._width = height or open_size, width or open_size
        self._shorter = wanted.size
        if wanted.size is not None and wanted.size < max(self._height, self._width):
            raise LoadError(
                "the images would be smaller than the model's input",
                where="calibration.size",
                why=f"{wanted.size} pixels, and the input has {self._height} x {self._width}",
            )
        self._mean = _per_channel(wanted.mean or MEAN, channels, "mean")
        self._std = _per_channel(wanted.std or STD, channels, "std")
        self.notes: tuple[str, ...] = ()
        if wanted.mean is None or wanted.std is None:
            self.notes = (
                "images are normalised by the mean and deviation of ImageNet: set mean and std in "
                "the recipe if the model was trained with others",
            )

    def __call__(self, image: Image) -> Tensor:
        from PIL import Image as images

        width, height = image.size
        scale = (
            max(self._height / height, self._width / width)
            if self._shorter is None
            else self._shorter / min(height, width)
        )
        size = (max(self._width, round(width * scale)), max(self._height, round(height * scale)))
        check_pixels(*size, "", f" when {width} x {height} are scaled to cover the input")
        image = image.resize(size, images.Resampling.BICUBIC)
        left, top = (size[0] - self._width) // 2, (size[1] - self._height) // 2
        image = image.crop((left, top, left + self._width, top + self._height))
        values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
        values = (values.reshape(self._height, self._width, -1) - self._mean) / self._std
        return values if self._last else values.permute(2, 0, 1).contiguous()


def _per_channel(values: Sequence[float], channels: int, name: str) -> Tensor:
    if len(values) not in (1, channels):
        if values in (MEAN, STD):
            values = (sum(values) / len(values),)
        else:
            raise LoadError(
                "there must be one number for each channel, or one for all",
                where=f"calibration.{name}",
                why=f"{len(values)} numbers for {channels} channels",
            )
    return torch.tensor(values, dtype=torch.float32)


def _processor(program: BaseProgram) -> Any | None:
    """The image processor of the checkpoint behind a program, if it has one."""
    source = program.source
    path = source.path if source else None
    if (
        source is None
        or path is None
        or not any((Path(path) / name).is_file() for name in _PROCESSORS)
    ):
        return None
    import transformers

    opened: Any = transformers.AutoImageProcessor
    try:
        return open_part(opened, Path(path), "the image processor", trust=source.trust)
    except LoadError:
        raise
    except Exception as error:  # what a processor's code raises, and what it can't import
        raise LoadError(
            "transformers can't open the image processor",
            where=str(path),
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint="set size, mean and std in the recipe to do without it",
        ) from error


def _by_processor(processor: Any, name: str) -> Callable[[Image], Tensor]:
    def made(image: Image) -> Tensor:
        try:
            found = processor(images=image, return_tensors="pt")
            values = found[name] if name in found else found["pixel_values"]
            return torch.as_tensor(values)[0]
        except Exception as error:  # what a processor's code raises
            raise LoadError(
                "the image processor can't read the image",
                why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                hint="set size, mean and std in the recipe to do without it",
            ) from error

    return made
