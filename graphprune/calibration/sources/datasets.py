"""Directories that ``datasets.save_to_disk`` wrote, read with pyarrow; nothing is executed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from graphprune.calibration.sources.arrays import ids_of_lists
from graphprune.calibration.sources.arrow import check_plain
from graphprune.calibration.sources.contents import File, Files, Ids, Text
from graphprune.calibration.text.read import LINE, READ, opened, parsed, too_long
from graphprune.errors import LoadError

COLUMNS = ("text", "input_ids", "image", "audio")
_ROWS = 64
"""Rows that are checked and turned into Python's objects at a time; one may be a long document."""


def read_dataset(path: Path, split: str | None, field: str | None) -> Text | Ids | Files:
    """One column of a saved data set.

    Args:
        path: the directory.
        split: its part, for a ``DatasetDict``; None for its only one, or ``train``.
        field: the column; None for the first of `COLUMNS` that there is.

    Returns:
        Text, rows joined by blank lines, or token ids, of at most `READ` characters or ids, from
        the beginning; without what a column ``attention_mask`` says is padding. Or the bytes of
        images or recordings.

    Raises:
        LoadError: pyarrow is missing, the directory is incomplete, or it has no such split or
            column.
    """
    folder, split = _part(path, split)
    table = _table(folder)
    names = [str(name) for name in table.column_names]
    name = field or next((n for n in COLUMNS if n in names), None)
    if name is None or name not in names:
        raise LoadError(
            f"the data set has no column '{field}'"
            if field
            else f"the data set has no column {', '.join(COLUMNS)}",
            where=str(path),
            why=f"its columns are {', '.join(names) or 'none'}",
            hint="name one with field",
        )
    import pyarrow.types as types

    kind = table.schema.field(name).type
    where = f"{path}, column {name}"
    if types.is_string(kind) or types.is_large_string(kind):
        return Text("\n\n".join(_texts(table.column(name), where)), split)
    if _holds_lists(kind) and types.is_integer(kind.value_type):
        mask = table.column("attention_mask") if "attention_mask" in names else None
        return ids_of_lists(_lists(table.column(name), mask, where), where, split)
    parts = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
    if "bytes" in parts:
        return Files("either", _Rows(table.column(name), where), split)
    raise LoadError(
        "the column holds no text, token ids, images or recordings",
        where=where,
        why=f"its type is {kind}",
        hint=f"name another of {', '.join(names)} with field",
    )


def _part(path: Path, split: str | None) -> tuple[Path, str | None]:
    """The directory of a split, and its name."""
    if not (path / "dataset_dict.json").is_file():
        own = _json(path / "state.json").get("_split")
        if split is not None and own is not None and split != own:
            raise LoadError(
                f"the data set has no split '{split}'", where=str(path), why=f"it is '{own}'"
            )
        return path, own if isinstance(own, str) else split
    splits = [str(s) for s in _json(path / "dataset_dict.json").get("splits", [])]
    if split is None and len(splits) == 1:
        split = splits[0]
    split = "train" if split is None else split
    if split not in splits or Path(split).name != split:
        raise LoadError(
            f"the data set has no split '{split}'",
            where=str(path),
            why=f"its splits are {', '.join(splits) or 'none'}",
            hint="name one with split",
        )
    return path / split, split


def _table(folder: Path) -> Any:
    """All rows, mapped into memory."""
    try:
        import pyarrow as pa
    except ImportError:
        raise LoadError(
            "a saved data set is read with pyarrow, which is not installed",
            where=str(folder),
            hint="pip install 'graphprune[data]', or save its text as a .jsonl file",
        ) from None
    entries = _json(folder / "state.json").get("_data_files")
    names = [e.get("filename") for e in entries or [] if isinstance(e, dict)]
    if not names:
        raise LoadError("the data set names no files", where=str(folder / "state.json"))
    tables = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise LoadError("a file of the data set lies outside of it", where=str(folder),
                            why=str(name))  # fmt: skip
        with opened(folder / name):
            pass
        try:
            with pa.memory_map(str(folder / name)) as source:
                check_plain(source, str(folder / name))
                source.seek(0)
                tables.append(pa.ipc.open_stream(source).read_all())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise LoadError(
                "a file of the data set can't be read",
                where=str(folder / name),
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                hint="is the file complete?",
            ) from error
    try:
        table = pa.concat_tables(tables)
        _ = table.column_names  # decoded only now
    except UnicodeDecodeError as error:
        raise LoadError("a name of a column is not UTF-8", where=str(folder)) from error
    except pa.ArrowException as error:
        raise LoadError(
            "the files of the data set have different columns", where=str(folder)
        ) from error
    return table


def _texts(column: Any, where: str) -> Iterator[str]:
    total = 0
    for value in _values(column, where):
        if value is not None:
            yield value
            total += len(value)
        if total >= READ:
            return


def _lists(column: Any, mask: Any, where: str) -> list[list[int]]:
    """Token ids by row, without padding."""
    rows, total = [], 0
    masks = _values(mask, where) if mask is not None else None
    for row in _values(column, where):
        tokens = [t for t in row or () if t is not None]
        shown = next(masks) if masks is not None else None
        if shown is not None and len(shown) == len(tokens):
            tokens = [t for t, is_token in zip(tokens, shown, strict=True) if is_token]
        rows.append(tokens)
        total += len(tokens)
        if total >= READ:
            break
    return rows


class _Rows(Sequence[File]):
    """Images or recordings of a column, each read when it is asked for."""

    def __init__(self, column: Any, where: str) -> None:
        self._column = column
        self._where = where

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, at: int) -> File: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[File]: ...

    def __getitem__(self, at: int | slice) -> File | Sequence[File]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        (value,) = list(_values(self._column.slice(at, 1), self._where))
        value = value or {}
        if value.get("bytes") is None:
            raise LoadError(
                "the data set names files that it doesn't hold",
                where=f"{self._where}, row {at}",
                hint="give the directory of the files themselves",
            )
        return File(f"{self._where}, row {at}", value["bytes"])


def _values(column: Any, where: str) -> Iterator[Any]:
    """Elements in Python's types, some at a time.

    Raises:
        LoadError: they contradict themselves, or strings aren't UTF-8.
    """
    import pyarrow as pa

    for start in range(0, len(column), _ROWS):
        part = column.slice(start, _ROWS)
        try:
            part.validate(full=True)  # offsets may lead anywhere, and are followed without a look
        except pa.ArrowException as error:
            raise LoadError(
                "a file of the data set is damaged",
                where=f"{where}, rows {start} to {start + len(part) - 1}",
                why=str(error).splitlines()[0],
                hint="is the file complete?",
            ) from error
        yield from part.to_pylist()


def _holds_lists(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _json(path: Path) -> dict[str, Any]:
    with opened(path) as file:
        raw = file.read(LINE + 1)
    if len(raw) > LINE:
        raise too_long("the file", str(path), "is it of a saved data set?")
    try:
        value = parsed(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise LoadError("this is not JSON", where=str(path)) from None
    return value if isinstance(value, dict) else {}
