"""Which kind of data a source is, by its name, and which options go with that; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.text.read import LINES, OWN_TEXTS
from graphprune.errors import LoadError, RecipeError
from graphprune.files.paths import is_factory, usable

SUFFIXES = (".npy", ".npz", ".safetensors")
"""Of files of arrays."""

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")

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

OPTIONS: dict[str, tuple[Kind, ...]] = {
    "field": ("records", "dataset"),
    "split": ("dataset",),
    "size": ("images", "dataset"),
    "mean": ("images", "dataset"),
    "std": ("images", "dataset"),
}
WORDS: dict[Kind, str] = {
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


def check_options(kind: Kind, wanted: Calibration) -> None:
    """See that all options of a section mean something for a kind of data.

    Raises:
        RecipeError: one doesn't.
    """
    for option, kinds in OPTIONS.items():
        if getattr(wanted, option) is not None and kind not in kinds:
            raise RecipeError(
                f"'{option}' means nothing for {WORDS[kind]}",
                where=f"calibration.{option}",
                hint=f"it is for {' and '.join(WORDS[k] for k in kinds)}; leave it out",
            )


def _kind_of_directory(path: Path) -> Kind:
    if is_dataset(path):
        return "dataset"
    images, audio = within(path, IMAGES), within(path, AUDIO)
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


def within(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files below a directory in the order of their names, without hidden ones."""
    found = []
    for path in folder.rglob("*"):
        shown = not any(part.startswith(".") for part in path.relative_to(folder).parts)
        if shown and path.suffix.lower() in suffixes and path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def is_dataset(path: Path) -> bool:
    """Whether a directory has the files of a saved ``Dataset`` or ``DatasetDict``."""
    alone = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return alone or (path / "dataset_dict.json").is_file()
