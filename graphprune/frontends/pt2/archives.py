"""Zip archives that PyTorch writes, read strictly: every reader has to see the same entries.

A zip file says twice what it holds, beside each entry and in a directory at its end, and readers
differ in which of the two they believe. What is checked here would be worth nothing if PyTorch's
own reader found something else, so that an archive which leaves any choice is refused.
"""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

from graphprune.errors import LoadError

_LOCAL = struct.Struct("<4s5H3I2H")
_STREAMED = 0x08
"""The flag of an entry whose sizes follow its data; those beside its name may be zero then."""
_ENTRIES = 1_000_000


@dataclass(frozen=True)
class Entry:
    """One file in an archive.

    Attributes:
        start: where its bytes begin in the archive.
        size: how many they are.
    """

    start: int
    size: int


@dataclass(frozen=True)
class Archive:
    """A checked archive.

    Attributes:
        entries: name below the one folder at the root to the entry.
        source: the file, or the bytes of an archive inside an archive.
    """

    entries: Mapping[str, Entry]
    source: Path | bytes

    @classmethod
    def open(cls, source: Path | bytes, where: str) -> Archive:
        """Read the directory of an archive.

        Args:
            source: the file, or its bytes.
            where: what to call it in errors.

        Raises:
            LoadError: it is damaged, or of a form that PyTorch doesn't write.
        """
        try:
            with _reading(source) as file:
                return cls(_entries(file, where), source)
        except (
            OSError, zipfile.BadZipFile, struct.error, ValueError, NotImplementedError
        ) as error:  # fmt: skip
            raise LoadError(
                "the archive is damaged",
                where=where,
                why=str(error) or type(error).__name__,
                hint="download it or save it again",
            ) from error

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of an entry.

        Raises:
            LoadError: there is no such entry, or it is larger than the limit.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise LoadError("the archive lacks an entry", where=name, hint="save it again")
        if entry.size > limit:
            raise LoadError(
                "an entry of the archive is too large",
                where=name,
                why=f"{entry.size:,} bytes; at most {limit:,} are read",
            )
        with _reading(self.source) as file:
            file.seek(entry.start)
            return file.read(entry.size)


def _reading(source: Path | bytes) -> IO[bytes]:
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _entries(file: IO[bytes], where: str) -> dict[str, Entry]:
    with zipfile.ZipFile(file) as archive:
        listed = archive.infolist()
        start = archive.start_dir
        if archive.comment:
            raise _refused("it has a comment behind its directory", where)
    _check_end(file, start, where)
    if len(listed) > _ENTRIES:
        raise _refused(f"it has {len(listed):,} entries", where)
    found: dict[str, Entry] = {}
    folded: set[str] = set()
    roots: set[str] = set()
    end = 0
    for info in sorted(listed, key=lambda one: one.header_offset):
        name = info.orig_filename
        if info.header_offset < end:
            raise _refused("entries lie over one another", f"{where}: {name}")
        entry = _entry(file, info, where)
        end = entry.start + entry.size
        root, _, below = name.partition("/")
        roots.add(root)
        # PyTorch looks names up without regard to case.
        if below.lower() in folded:
            raise _refused("two entries have the same name", f"{where}: {name}")
        folded.add(below.lower())
        found[below] = entry
    if end > start:
        raise _refused("an entry reaches beyond the end of the data", where)
    if len(roots) != 1:
        raise _refused("its entries aren't all in one folder", where)
    return found


def _check_end(file: IO[bytes], start: int, where: str) -> None:
    """See that the directory is where its end says, with nothing before or behind.

    Python and PyTorch look for it in different ways, which lead to one place only then.
    """
    size = file.seek(0, 2)
    file.seek(size - 22)
    tail = struct.unpack("<4s4H2IH", file.read(22))
    length, offset = tail[5], tail[6]
    end = size - 22
    if tail[0] != b"PK\5\6":
        raise _refused("there is something behind its directory", where)
    if end >= 20:
        file.seek(end - 20)
        locator = struct.unpack("<4sIQI", file.read(20))
        if locator[0] == b"PK\6\7":
            end -= 20 + 56
            if locator[2] != end:
                raise _refused("it has two directories", where)
            file.seek(end)
            large = struct.unpack("<4sQ2H2I4Q", file.read(56))
            if large[0] != b"PK\6\6" or large[1] != 44:
                raise _refused("it has two directories", where)
            length, offset = large[8], large[9]
    if offset != start or offset + length != end:
        raise _refused("its directory isn't where its end says", where)


def _entry(file: IO[bytes], info: zipfile.ZipInfo, where: str) -> Entry:
    """Where the bytes of an entry are, which both of its descriptions have to agree on."""
    name = info.orig_filename
    here = f"{where}: {name}"
    parts = name.split("/")
    if any(p in ("", ".", "..") for p in parts) or "\\" in name or not name.isprintable():
        raise _refused("an entry's name leads elsewhere", here)
    if len(parts) < 2:
        raise _refused("its entries aren't all in one folder", here)
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise _refused("an entry is a link or a device", here)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _refused(
            f"an entry is compressed, from {info.file_size:,} bytes to {info.compress_size:,}", here
        )
    if info.flag_bits & 0x1:
        raise _refused("an entry is encrypted", here)
    file.seek(info.header_offset)
    local = _LOCAL.unpack(file.read(_LOCAL.size))
    raw = file.read(local[9])
    text = raw.decode("utf-8" if local[2] & 0x800 else "cp437")
    sizes = {local[7], local[8]}
    streamed = local[2] & _STREAMED and sizes == {0}
    wide = sizes == {0xFFFFFFFF}
    same = streamed or wide or sizes == {info.file_size}
    if local[0] != b"PK\3\4" or text != name or local[3] != info.compress_type or not same:
        raise _refused("an entry is described in two ways", here)
    return Entry(info.header_offset + _LOCAL.size + local[9] + local[10], info.file_size)


def _refused(why: str, where: str) -> LoadError:
    return LoadError(
        "the archive isn't as PyTorch writes it",
        where=where,
        why=why,
        hint="save it again with torch.export.save, or open it with --trust (trust=True) if you "
        "know where it comes from",
    )
