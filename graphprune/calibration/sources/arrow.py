"""Arrow streams: whether what they hold has the size of the file.

A compressed batch may stand for any amount of memory, and pyarrow unpacks it before anything can be
asked of it. Data sets are saved without compression, so that they can be mapped.
"""

from __future__ import annotations

import struct
from typing import Any

from graphprune.errors import LoadError

# Fields of the tables of Arrow's Message.fbs, by their place.
_KIND, _HEADER = 1, 2
_DICTIONARY, _BATCH = 2, 3  # of the union of headers
_DATA = 1  # of a DictionaryBatch
_COMPRESSION = 3  # of a RecordBatch


def check_plain(source: Any, where: str) -> None:
    """Refuse a stream with compressed batches.

    Args:
        source: what pyarrow reads it from.
        where: its file.

    Raises:
        LoadError: a batch is compressed.
        ValueError: a message is damaged.
        pyarrow.ArrowException: likewise.
    """
    import pyarrow as pa

    for message in pa.ipc.MessageReader.open_stream(source):
        try:
            compressed = _is_compressed(message.metadata.to_pybytes())
        except (struct.error, IndexError) as error:
            raise ValueError("the description of a batch is damaged") from error
        if compressed:
            raise LoadError(
                "the data set is compressed",
                where=where,
                why="what it holds may be of any size, and is unpacked as a whole",
                hint="save it with datasets.save_to_disk, which doesn't compress",
            )


def _is_compressed(message: bytes) -> bool:
    """Whether a flatbuffer ``Message`` is of a batch with a field ``compression``."""
    root = _unsigned(message, 0)
    kind, header = _field(message, root, _KIND), _field(message, root, _HEADER)
    if kind is None or header is None:
        return False
    batch: int | None = header + _unsigned(message, header)
    if message[kind] == _DICTIONARY:
        data = _field(message, header + _unsigned(message, header), _DATA)
        batch = None if data is None else data + _unsigned(message, data)
    elif message[kind] != _BATCH:
        return False
    return batch is not None and _field(message, batch, _COMPRESSION) is not None


def _field(message: bytes, table: int, number: int) -> int | None:
    """Where a field of a table is; None if it isn't there."""
    (back,) = struct.unpack_from("<i", message, table)
    names = table - back
    (size,) = struct.unpack_from("<H", message, names)
    place = 4 + 2 * number
    if place + 2 > size:
        return None
    (offset,) = struct.unpack_from("<H", message, names + place)
    return table + offset if offset else None


def _unsigned(message: bytes, at: int) -> int:
    (value,) = struct.unpack_from("<I", message, at)
    return int(value)
