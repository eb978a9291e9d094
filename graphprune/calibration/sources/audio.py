"""Recordings as a model reads them: ``.wav`` files through the checkpoint's feature extractor."""

from __future__ import annotations

import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.signature import Input
from graphprune.calibration.sources.contents import File
from graphprune.checkpoints.own_code import open_part
from graphprune.errors import LoadError
from graphprune.files.json import read_limited

NAMES = ("input_features", "input_values")
"""What the inputs of models of speech are called: spectrograms, and waves."""

RATE = 16_000
"""Samples per second, where no feature extractor says."""

CHANNELS = 64
LONGEST = 1 << 27
"""Samples of all channels that are read of one recording: over two hours at 16,000 a second."""

TRANSCRIPT = 1 << 16
"""Bytes of a transcript."""


def audio_input(inputs: Sequence[Input]) -> Input | None:
    """The input that recordings are for."""
    return next((i for i in inputs if i.name in NAMES), None)


def load_audio(
    files: Sequence[File],
    count: int,
    program: BaseProgram,
    inputs: Sequence[Input],
    tokenizer: Any | None,
) -> tuple[list[dict[str, Tensor]], tuple[str, ...]]:
    """Samples of recordings, long ones in pieces, until there are enough.

    Where a model also reads ``decoder_input_ids``, they are the transcripts beside the recordings
    (``a.txt`` of ``a.wav``) if all have one, and else the ids of the trace's example.

    Args:
        files: the recordings, in the order in which they are taken.
        count: samples at most.
        program: its checkpoint's feature extractor is used.
        inputs: its inputs.
        tokenizer: for transcripts.

    Returns:
        For each sample its inputs, each with a batch of one; and what there is to say of them.

    Raises:
        LoadError: a recording can't be read or has another rate (the file is named), all are
            shorter than the model's input, or there is no feature extractor.
    """
    given = audio_input(inputs)
    assert given is not None
    extractor = open_extractor(program, given)
    rate = int(getattr(extractor, "sampling_rate", RATE))
    whole = given.name == "input_values"
    length = given.shape[1] if whole else getattr(extractor, "n_samples", None)
    if length is not None and not (type(length) is int and 0 < length <= LONGEST):
        raise LoadError(
            "the feature extractor takes no usable number of samples",
            where=str(_folder(program)),
            why=f"it is {length!r}, and 1 to {LONGEST:,} are possible",
        )
    found: list[dict[str, Tensor]] = []
    used: list[File] = []
    for file in files:
        for piece in _pieces(_read(file, rate, length, count - len(found)), length, whole):
            found.append({given.name: _features(extractor, piece, rate, given.name, file)})
            used.append(file)
        if len(found) >= count:
            break
    if not found:
        raise LoadError(
            "the recordings are shorter than the model's input",
            where=files[0].name,
            why=f"it takes {length} samples at {rate} per second",
        )
    if not any(i.name == "decoder_input_ids" for i in inputs):
        return found, ()
    targets = _transcripts(used, tokenizer)
    notes: tuple[str, ...] = ()
    if targets is None:
        targets = [_example_ids(program)] * len(found)
        notes = (
            "the decoder reads the random tokens of the trace's example: put a transcript beside "
            "every recording, a.txt of a.wav",
        )
    for sample, ids in zip(found, targets, strict=True):
        sample["decoder_input_ids"] = ids
    return found, notes


def _folder(program: BaseProgram) -> Path | None:
    """The checkpoint behind a program."""
    return program.source.path if program.source else None


def _features(extractor: Any, piece: NDArray[Any], rate: int, name: str, file: File) -> Tensor:
    try:
        features = extractor(piece, sampling_rate=rate, return_tensors="pt")
        return torch.as_tensor(features[name])
    except Exception as error:  # what an extractor's code raises
        raise LoadError(
            "the feature extractor can't read the recording",
            where=file.name,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from error


def open_extractor(program: BaseProgram, given: Input) -> Any:
    """Open the feature extractor of a program's checkpoint.

    Args:
        program: the model.
        given: the input that recordings go to, for the error's hint.

    Raises:
        LoadError: there is none, or transformers can't open it.
    """
    source = program.source
    path = _folder(program)
    hint = f"give {given.name} as arrays: a .npz or .safetensors file"
    if source is None or path is None or not (Path(path) / "preprocessor_config.json").is_file():
        raise LoadError("recordings need a feature extractor, and the model has none", hint=hint)
    import transformers

    opened: Any = transformers.AutoFeatureExtractor
    try:
        return open_part(opened, Path(path), "the feature extractor", trust=source.trust)
    except LoadError:
        raise
    except Exception as error:  # what its code raises, and what it can't import
        raise LoadError(
            "transformers can't open the feature extractor",
            where=str(path),
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint=hint,
        ) from error


def _read(file: File, rate: int, length: int | None, pieces: int) -> NDArray[Any]:
    """The channels' mean, between -1 and 1, of as many samples as are needed."""
    try:
        source = file.opened()
        size = source.stat().st_size if isinstance(source, Path) else len(source.getbuffer())
        with wave.open(str(source) if isinstance(source, Path) else source, "rb") as recording:
            channels, width, own, frames = recording.getparams()[:4]
            wanted = frames if length is None else min(frames, pieces * length)
            _check_header(file, channels, width, wanted)
            # What the header says may be more than there is, and would be set aside.
            raw = recording.readframes(wanted) if wanted * channels * width <= size else b""
    except FileNotFoundError:
        raise LoadError("the recording does not exist", where=file.name) from None
    except (wave.Error, EOFError, OSError, RuntimeError) as error:
        why = str(error) or "the file ends too early"
        raise LoadError(
            "the recording can't be read",
            where=file.name,
            why=why,
            hint="save it as .wav with whole numbers (PCM)",
        ) from error
    if len(raw) < wanted * channels * width:
        raise LoadError("the recording can't be read", where=file.name,
                        why="the file ends too early")  # fmt: skip
    if own != rate:
        raise LoadError(
            "the recording has another rate than the model",
            where=file.name,
            why=f"{own} samples per second, and the model reads {rate}",
            hint=f"convert it: ffmpeg -i in.wav -ar {rate} out.wav",
        )
    mixed: NDArray[Any] = _numbers(raw, width).reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return mixed


def _check_header(file: File, channels: int, width: int, wanted: int) -> None:
    """Refuse what can't be meant, or would take too much memory.

    Raises:
        LoadError: samples have more than four bytes, there are too many channels, or more than
            `LONGEST` samples are needed of one recording.
    """
    why = None
    if not 1 <= width <= 4:
        why = f"its samples have {width} bytes each, and 1 to 4 are read"
    elif channels > CHANNELS:
        why = f"it has {channels} channels, and {CHANNELS} are the limit"
    elif wanted * channels > LONGEST:
        why = f"{wanted:,} samples of {channels} channels are needed, and {LONGEST:,} in all are "
        why += "the limit"
    if why is not None:
        raise LoadError(
            "the recording can't be read",
            where=file.name,
            why=why,
            hint="save it as .wav with one or two channels, or cut it into parts",
        )


def _numbers(raw: bytes, width: int) -> NDArray[Any]:
    """PCM of one to four bytes."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:  # as the upper three bytes of four
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        raw, width = wide.tobytes(), 4
    values = np.frombuffer(raw, "<i2" if width == 2 else "<i4").astype(np.float64)
    scaled: NDArray[Any] = (values / 2 ** (8 * width - 1)).astype(np.float32)
    return scaled


def _pieces(values: NDArray[Any], length: int | None, whole: bool) -> Iterator[NDArray[Any]]:
    """Cuts a recording; `whole` drops a shorter end."""
    if length is None:
        yield values
        return
    for start in range(0, len(values), length):
        piece = values[start : start + length]
        if len(piece) == length or not whole:
            yield piece


def _transcripts(files: Sequence[File], tokenizer: Any | None) -> list[Tensor] | None:
    """What was said, as the decoder reads it; None where it isn't known for each sample."""
    if tokenizer is None or len({file.name for file in files}) < len(files):
        return None
    found = []
    for file in files:
        path = file.content.with_suffix(".txt") if isinstance(file.content, Path) else None
        if path is None or not path.is_file():
            return None
        try:
            text = read_limited(path, TRANSCRIPT).decode("utf-8").strip()
        except (OSError, ValueError) as error:
            raise LoadError("the transcript can't be read", where=str(path),
                            why=str(error)) from error  # fmt: skip
        # The decoder reads everything but the last token, which it has to find.
        ids = list(tokenizer(text)["input_ids"])[:-1]
        if not ids:
            raise LoadError("the transcript is empty", where=str(path))
        found.append(torch.tensor([ids], dtype=torch.int64))
    return found


def _example_ids(program: BaseProgram) -> Tensor:
    _, named = program.example or ((), {})
    ids = named.get("decoder_input_ids")
    if not isinstance(ids, Tensor):
        raise LoadError(
            "the decoder's tokens aren't known",
            hint="put a transcript beside every recording, a.txt of a.wav, or give arrays: a .npz "
            "file with decoder_input_ids",
        )
    return ids[:1].to("cpu")
