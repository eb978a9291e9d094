"""Which kind of data a source is, and reading it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from graphprune.calibration import (
    BUILTIN,
    LINE,
    LINES,
    OWN_TEXTS,
    joined,
    opened,
    parsed,
    read_lines,
    read_text,
    record_of,
    too_long,
)
from graphprune.errors import LoadError, RecipeError
from graphprune.frontends.factory import call_own, is_factory
from graphprune.paths import usable
from graphprune.recipe_calibration import Calibration
from graphprune.samples.arrays import PICKLES, SUFFIXES, ids_of_lists, read_arrays
from graphprune.samples.contents import Arrays, Content, File, Files, Ids, Own, Text
from graphprune.samples.datasets import is_dataset, read_dataset

Kind: TypeAlias = Literal["text", "records", "dataset", "arrays", "images", "audio", "function"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
AUDIO = (".wav",)
_OTHERS = {
    **dict.fromkeys((".gif", ".ppm", ".pgm", ".eps", ".svg", ".heic", ".avif"), "save it as PNG"),
    **dict.fromkeys((".mp3", ".flac", ".ogg", ".m4a"), "save it as .wav with whole numbers (PCM)"),
    **dict.fromkeys((".gz", ".zip", ".xz", ".zst", ".bz2", ".tar", ".tgz"), "unpack it"),
    **dict.fromkeys((".parquet", ".arrow"), "save it as .jsonl, or with datasets.save_to_disk"),
}
"""Suffixes of files that would else be taken for text, and what to do with them."""

_OPTIONS: dict[str, tuple[Kind, ...]] = {
    "field": ("records", "dataset"),
    "split": ("dataset",),
    "size": ("images", "dataset"),
    "mean": ("images", "dataset"),
    "std": ("images", "dataset"),
}
_WORDS: dict[Kind, str] = {
    "text": "text",
    "records": "JSON records",
    "dataset": "a saved data set",
    "arrays": "arrays",
    "images": "images",
    "audio": "recordings",
    "function": "a function",
}


def kind_of(source: str) -> Kind:
    """Which kind of data a source is, by its name, and of a directory by what is in it.

    Raises:
        LoadError: a directory has nothing that is known, or the file is a pickle.
    """
    if source in OWN_TEXTS:
        return "text"
    if is_factory(source):
        return "function"
    path = usable(source)
    if path.is_dir():
        return _kind_of_directory(path)
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise LoadError(
            f"{suffix} files hold Python objects, which would have to be executed",
            where=source,
            hint="save arrays as .npy, .npz or .safetensors",
        )
    if suffix in _OTHERS:
        raise LoadError(f"{suffix} files are not read", where=source, hint=_OTHERS[suffix])
    suffixes: dict[Kind, tuple[str, ...]] = {
        "records": (*LINES, ".json"),
        "arrays": SUFFIXES,
        "images": IMAGES,
        "audio": AUDIO,
    }
    return next((kind for kind, known in suffixes.items() if suffix in known), "text")


def read(source: str, wanted: Calibration) -> Content:
    """What a source holds.

    Args:
        source: see `graphprune.samples`.
        wanted: has the options.

    Raises:
        LoadError: the source is missing, damaged or empty, or of an unknown kind.
        RecipeError: an option means nothing for this kind of source.
    """
    kind = kind_of(source)
    if wanted.data == source or (wanted.data is None and source == (wanted.source or BUILTIN)):
        _check_options(kind, wanted)
    else:  # a text to measure on beside the data, whose options these are
        wanted = Calibration()
    path = Path(source)
    if kind == "function":
        return Own(call_own(source, "function"))
    if kind == "text":
        return Text(read_text(source))
    if kind == "records":
        return _records(path, wanted.field)
    if kind == "dataset":
        return read_dataset(path, wanted.split, wanted.field)
    if kind == "arrays":
        return Arrays(read_arrays(path))
    paths = _within(path, IMAGES if kind == "images" else AUDIO) if path.is_dir() else [path]
    for one in paths[:1]:
        with opened(one):
            pass
    return Files(kind, tuple(File(str(one), one) for one in paths))


def bounded(data: Any, most: int) -> Any:
    """The first elements of what an iterator would yield for ever; other data as it is."""
    return list(islice(data, most)) if hasattr(data, "__next__") else data


def _check_options(kind: Kind, wanted: Calibration) -> None:
    for option, kinds in _OPTIONS.items():
        if getattr(wanted, option) is not None and kind not in kinds:
            raise RecipeError(
                f"'{option}' means nothing for {_WORDS[kind]}",
                where=f"calibration.{option}",
                hint=f"it is for {' and '.join(_WORDS[k] for k in kinds)}; leave it out",
            )


def _kind_of_directory(path: Path) -> Kind:
    if is_dataset(path):
        return "dataset"
    images, audio = _within(path, IMAGES), _within(path, AUDIO)
    if images and audio:
        raise LoadError(
            "the directory has images and recordings", where=str(path), hint="give one kind"
        )
    if not images and not audio:
        raise LoadError(
            "the directory has no calibration data",
            where=str(path),
            why=f"no file ends in {', '.join((*IMAGES, *AUDIO))}, and it is no saved data set",
            hint="give a file, or a directory of images, of .wav files, or from save_to_disk",
        )
    return "images" if images else "audio"


def _within(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files below a directory in the order of their names, without hidden ones."""
    found = []
    for path in folder.rglob("*"):
        shown = not any(part.startswith(".") for part in path.relative_to(folder).parts)
        if shown and path.suffix.lower() in suffixes and path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _records(path: Path, field: str | None) -> Text | Ids:
    records = read_lines(path, field) if path.suffix.lower() in LINES else _list(path, field)
    lists = [record for record in records if isinstance(record, list)]
    if lists and len(lists) == len(records):
        return ids_of_lists(lists, str(path))
    text = joined(records, path)
    if not text.strip():
        raise LoadError("the text file is empty", where=str(path))
    return Text(text)


def _list(path: Path, field: str | None) -> list[str | list[int]]:
    """Records of one JSON value: a list of them, or an object with such a list."""
    with opened(path) as file:
        raw = file.read(LINE + 1)
    if len(raw) > LINE:
        hint = "save it as .jsonl with one record a line, which is read as far as it is needed"
        raise too_long("the file", str(path), hint)
    try:
        value = parsed(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
        raise LoadError("the text file is not text", where=str(path), why=why) from None
    if isinstance(value, dict):
        names = ("text", "input_ids") if field is None else (field,)
        value = next((value[name] for name in names if name in value), value)
    if not isinstance(value, list) or all(type(item) is int for item in value):
        value = [value]
    return [record_of(item, field, f"{path}, item {i}") for i, item in enumerate(value)]
