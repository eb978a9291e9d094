"""Which kind of data a source is, and reading it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from graphprune.calibration.sources.arrays import ids_of_lists, read_arrays
from graphprune.calibration.sources.contents import Arrays, Content, File, Files, Ids, Own, Text
from graphprune.calibration.sources.datasets import read_dataset
from graphprune.calibration.sources.kinds import AUDIO, IMAGES, check_options, kind_of, within
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.text.read import (
    BUILTIN,
    LINE,
    LINES,
    joined,
    opened,
    parsed,
    read_lines,
    read_text,
    record_of,
    too_long,
)
from graphprune.errors import LoadError
from graphprune.frontends.factory import call_own


def read(source: str, wanted: Calibration) -> Content:
    """What a source holds.

    Args:
        source: see `graphprune.calibration`.
        wanted: has the options.

    Raises:
        LoadError: the source is missing, damaged or empty, or of an unknown kind.
        RecipeError: an option means nothing for this kind of source.
    """
    kind = kind_of(source)
    if source == wanted.data or (wanted.data is None and source in (wanted.text or (BUILTIN,))):
        check_options(kind, wanted)
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
    paths = within(path, IMAGES if kind == "images" else AUDIO) if path.is_dir() else [path]
    for one in paths[:1]:
        with opened(one):
            pass
    return Files(kind, tuple(File(str(one), one) for one in paths))


def bounded(data: Any, most: int) -> Any:
    """The first elements of what an iterator would yield for ever; other data as it is."""
    return list(islice(data, most)) if hasattr(data, "__next__") else data


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
