"""`strip_u8`: a fixed count of values, each with its place as a byte, per row and 256 columns.

The layout in which data-centre GPUs read weights (`strip_gluon`). A *strip* is 256 columns of one
row; a *tile* is the same strip of 64 rows. Each strip has `slots` values, a multiple of 16, each
with its place in the strip as a byte. There are no offsets: shapes say where everything is.

    values   [tile row, tile column, chunk, 64 rows, 16 slots]
    places   the same, uint8: column XOR 8 (row % 8)

Places are those of the tile in shared memory, from which pieces of eight columns are read of eight
rows at once; the XOR puts these into different banks. As in Flash-LLM it is done when packing.

A thread reads eight slots at once and a warp 16 rows of a chunk: the memory order is the order of
reading. A strip with fewer values repeats its first one, which does no harm to who writes it twice
to the same place; an empty one writes a zero to a place. Rows and columns that fill up
the last tiles are empty.

Which slot a value is in is free, so the order is made for shared memory: the eight instructions of
a warp with which it scatters a chunk write 32 values each, and its 32 banks hold 64 columns of the
swizzled tile. `_order` sorts the values of a row by their bank, beginning at another one in each
row, so that the values of one instruction lie in different banks as far as possible.

A weight takes slots / 256 * (itemsize + 1) bytes: 1.5 of 2 at 50 %, 0.75 at 75 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .packed import FormatError, check_matrix, check_shape, check_tensor, first

ROWS, COLUMNS, CHUNK = 64, 256, 16
BANKS = 32
_EACH = 8  # slots that a thread reads at once
_TILES = 4  # rows of tiles that are packed at a time


@dataclass(frozen=True)
class Strip:
    """A packed weight.

    Attributes:
        shape: rows and columns.
        values: [ceil(rows / 64), ceil(columns / 256), slots / 16, 64, 16], floating-point.
        places: the same shape, uint8: where in the tile, column XOR 8 (row % 8).
    """

    format: ClassVar[str] = "strip_u8"
    shape: tuple[int, int]
    values: Tensor
    places: Tensor

    @property
    def slots(self) -> int:
        """Values per strip."""
        return int(self.values.shape[2]) * CHUNK

    @classmethod
    def pack(cls, weight: Tensor, slots: int | None = None) -> Self:
        """See `Packed.pack`.

        Args:
            weight: [rows, columns], floating-point.
            slots: per strip, a multiple of 16; None for what the fullest strip needs.

        Raises:
            FormatError: A strip has more values.
        """
        weight = check_matrix(cls.format, weight)
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % COLUMNS, 0, -rows % ROWS))
        tiles = padded.view(-(-rows // ROWS), ROWS, -1, COLUMNS).transpose(1, 2)
        kept = tiles != 0
        counts = kept.sum(3)  # [tile row, tile column, row]
        most = int(counts.max())
        slots = max(CHUNK, -(-most // CHUNK) * CHUNK) if slots is None else slots
        if slots < 1 or slots % CHUNK or slots > COLUMNS:
            raise FormatError(cls.format, "slots", f"{slots} isn't a multiple of 16 up to 256")
        if most > slots:
            _, across, _ = counts.shape
            strip = int((counts > slots).flatten().to(torch.uint8).argmax())
            row = strip // (across * ROWS) * ROWS + strip % ROWS
            column = strip // ROWS % across * COLUMNS
            why = (
                f"row {row} has {int(counts.flatten()[strip])} values in the 256 columns from "
                f"{column} on, {slots} slots are there"
            )
            raise FormatError(cls.format, "weight", why, row * columns + column)
        parts = []
        for begin in range(0, len(tiles), _TILES):  # the indices are large
            own = slice(begin, begin + _TILES)
            at = _order(kept[own], counts[own], slots)
            values = tiles[own].gather(3, at)
            values = values.where(values != 0, 0)  # negative zeros are zeros
            parts.append((_chunks(values), _chunks(_turned(at).to(torch.uint8))))
        found = (torch.cat(each) for each in zip(*parts, strict=True))
        return cls((rows, columns), *found)

    @classmethod
    def of_tensors(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """Put together what `tensors` returned; `validate` has yet to be called."""
        return cls(shape, tensors["values"], tensors["places"])

    def tensors(self) -> dict[str, Tensor]:
        """The parts that a file has to hold beside the shape."""
        return {"values": self.values, "places": self.places}

    def unpack(self) -> Tensor:
        """The dense matrix, [rows, columns], with positive zeros."""
        values, at = _slots(self.values), _turned(_slots(self.places).long())
        tiles = values.new_zeros(*values.shape[:3], COLUMNS).scatter_(3, at, values)
        rows, columns = self.shape
        return tiles.transpose(1, 2).flatten(0, 1).flatten(1)[:rows, :columns].contiguous()

    def validate(self) -> None:
        """Check every index, count and padding."""
        rows, columns = check_shape(self.format, self.shape)
        down, across = -(-rows // ROWS), -(-columns // COLUMNS)
        chunks = self.values.shape[2] if self.values.dim() == 5 else 1
        if not 1 <= chunks <= COLUMNS // CHUNK:
            raise FormatError(self.format, "values", f"{chunks} chunks of 16 in 256 columns")
        shape = (down, across, chunks, ROWS, CHUNK)
        check_tensor(self.format, "values", self.values, shape, None)
        check_tensor(self.format, "places", self.places, shape, torch.uint8)
        values, column = _slots(self.values), _turned(_slots(self.places).long())
        filled = values != 0
        limit = torch.full((across,), COLUMNS)
        limit[-1] = columns - (across - 1) * COLUMNS
        outside = filled & (column >= limit[None, :, None, None])
        outside[-1, :, rows - (down - 1) * ROWS :] |= filled[-1, :, rows - (down - 1) * ROWS :]
        at = first(_chunks(outside))
        if at is not None:
            raise FormatError(self.format, "places", "a value outside the matrix", at)
        # Two slots of one column must hold the same: which of them is written last is open.
        tiles = values.new_zeros(*values.shape[:3], COLUMNS).scatter_(3, column, values)
        at = first(_chunks(~_same(tiles.gather(3, column), values)))
        if at is not None:
            raise FormatError(self.format, "values", "another slot has the same place", at)


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _order(kept: Tensor, counts: Tensor, slots: int) -> Tensor:
    """Columns of the values of each strip, in the order of its slots.

    Args:
        kept: [tile rows, tile columns, 64, 256], bool.
        counts: [tile rows, tile columns, 64], how many are set.
        slots: per strip.

    Returns:
        [tile rows, tile columns, 64, slots], int64.
    """
    row = torch.arange(ROWS, device=kept.device)[:, None]
    bank = _word(_turned(torch.arange(COLUMNS, device=kept.device))) % BANKS
    by_bank = bank.argsort(dim=1, stable=True)  # eight columns of each bank
    ordered = kept.gather(3, by_bank.expand_as(kept))
    among = (
        ordered.view(*ordered.shape[:3], BANKS, -1).cumsum(4).flatten(3) - 1
    )  # its number in its bank
    wish = _wishes(slots, kept.device)[row, bank.gather(1, by_bank)]  # [64, 256, wishes]
    wish = wish.expand(*kept.shape, -1).gather(4, among.clamp(0, wish.shape[-1] - 1)[..., None])
    wish = wish[..., 0].where(ordered & (among < COLUMNS // BANKS), -1)
    found = torch.full((*counts.shape, slots + 1), -1, device=kept.device)
    found.scatter_(3, wish.where(wish >= 0, slots), by_bank.expand_as(kept))
    found = found[..., :slots]
    # Values whose bank has no slot left take those that no value of their bank has asked for.
    free = (found >= 0).argsort(dim=3, stable=True)
    late = ordered & (wish < 0)
    late_first = (~late).to(torch.uint8).argsort(dim=3, stable=True)[..., :slots]
    columns = by_bank.expand_as(kept).gather(3, late_first)
    fill = late.gather(3, late_first)
    found = found.scatter(3, free, columns.where(fill, found.gather(3, free)))
    some = kept.to(torch.uint8).argmax(3, keepdim=True)  # the first value; column 0 if none
    return found.where(found >= 0, some)


def _wishes(slots: int, device: torch.device) -> Tensor:
    """The slots in which values of a bank meet none of the same bank.

    The eight instructions that scatter a chunk of 16 rows write slots j and 8 + j of each row. Over
    a round of two chunks every row visits every bank once, row r beginning at bank r; over the
    single chunk that an odd number leaves, it visits half of them.

    Returns:
        [64, 32, rounds], slot by row and bank; -1 where there is none.
    """
    row = torch.arange(ROWS, device=device)[:, None]
    bank = torch.arange(BANKS, device=device)[None, :]
    turned = (bank - row) % BANKS
    step, pair = turned % (BANKS // 2), turned // (BANKS // 2)
    slot = step // _EACH * CHUNK + pair * _EACH + step % _EACH
    found = [slot + 2 * CHUNK * i for i in range(slots // (2 * CHUNK))]
    if slots % (2 * CHUNK):
        turned = (bank - 2 * row) % BANKS
        slot = slots - CHUNK + turned % 4 * _EACH + turned // 4
        found.append(slot.where(turned % 4 < 2, -1))
    found.append(torch.full_like(slot, -1))
    return torch.stack(found, 2)


def _turned(columns: Tensor) -> Tensor:
    """Places of columns, or columns of places.

    Args:
        columns: [..., 64, slots], int64.
    """
    return columns ^ 8 * (torch.arange(ROWS, device=columns.device)[:, None] % 8)


def _word(places: Tensor) -> Tensor:
    """Which word of the tile in shared memory weights of two bytes lie in.

    Args:
        places: [..., 64, slots].
    """
    row = torch.arange(ROWS, device=places.device)[:, None]
    return places // 2 + row * (COLUMNS // 2)


def _chunks(slots: Tensor) -> Tensor:
    """[tile row, tile column, row, slot] as [tile row, tile column, chunk, row, slot]."""
    return slots.view(*slots.shape[:3], -1, CHUNK).transpose(2, 3).contiguous()


def _slots(chunks: Tensor) -> Tensor:
    """The inverse of `_chunks`."""
    return chunks.transpose(2, 3).flatten(3)


def conflicts(packed: Strip) -> float:
    """How many turns a scatter instruction of a warp takes on average; 1 is free of conflicts.

    Words that several lanes write count once.
    """
    word = _word(packed.places.long())  # [tile row, tile column, chunk, 64, 16]
    # [..., warp's rows / 16, 16 rows, 2, 8] -> one instruction: 16 rows x 2 slots
    each = word.view(*word.shape[:3], -1, 16, 2, _EACH).movedim(6, 4).flatten(5)
    lanes = each.flatten(0, 4).sort(1).values
    fresh = torch.cat([torch.ones_like(lanes[:, :1]), (lanes.diff(dim=1) != 0).long()], 1)
    hits = torch.zeros(len(lanes), BANKS, dtype=torch.long)
    hits.scatter_add_(1, lanes % BANKS, fresh)
    return float(hits.max(1).values.float().mean())
