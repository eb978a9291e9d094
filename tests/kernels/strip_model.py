"""`strip_gluon` in NumPy, step by step: Gluon has no interpreter.

Offsets come from the functions that the kernel itself calls. What Gluon does is written down here
from its description: layouts, `reshape`, `split`, and the swizzle of shared memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from graphprune.kernels.formats.strip import Strip
from graphprune.kernels.gpu import strip_gluon as kernel


def elements(layout: Any) -> np.ndarray:
    """Coordinates of the elements of a linear layout: [warp, lane, register, 2]."""
    found = np.zeros((1, 1, 1, 2), dtype=int)
    for axis, bases in enumerate((layout.warp_bases, layout.lane_bases, layout.reg_bases)):
        for base in bases:
            found = np.concatenate([found, found ^ np.array(base)], axis=axis)
    return found


def load_words(memory: np.ndarray, begin: int, width: int, chunks: int) -> np.ndarray:
    """Words of a group of chunks, [64, width * chunks], each loaded by the thread that owns it."""
    own = elements(kernel.word_layout(width, chunks)).reshape(-1, 2)
    row, place = own.T
    loaded = np.zeros((64, width * chunks), dtype=np.uint32)
    loaded[row, place] = memory[begin + kernel.word_offset.fn(row, place, width)]
    times = np.zeros(loaded.shape, dtype=int)
    np.add.at(times, (row, place), 1)
    assert (times == 1).all(), "an element of the layout is missing or doubled"
    return loaded


def scatter_group(tile: np.ndarray, values: np.ndarray, places: np.ndarray) -> None:
    """`values` [64, 8 n] and `places` [64, 4 n] to the flat tile."""
    row = np.arange(64)[:, None]
    pairs = values.reshape(64, -1, 2)
    for slot in range(4):
        value = (pairs[..., slot // 2] >> np.uint32(slot % 2 * 16)).astype(np.uint16)
        place = places >> np.uint32(8 * slot) & np.uint32(255)
        tile[row * 256 + place] = value


def swizzled() -> np.ndarray:
    """Where shared memory of SwizzledSharedLayout(8, 1, 8, [1, 0]) has an element: [64, 256]."""
    vector, per_phase, phases = 8, 1, 8
    row, column = np.indices((64, 256))
    phase = row // per_phase % phases
    return row * 256 + (column // vector ^ phase) * vector + column % vector


def partial_sums(x: torch.Tensor, packed: Strip, splits: int, block: int) -> np.ndarray:
    """What `strip_kernel` leaves, [splits, M, N]; unwritten places hold NaN."""
    (n, k), m = packed.shape, len(x)
    down, across, chunks = packed.values.shape[:3]
    values = packed.values.flatten().view(torch.int32).numpy().view(np.uint32)
    places = packed.places.flatten().view(torch.int32).numpy().view(np.uint32)
    numbers = x.float().numpy()
    partials = np.full(splits * m * n, np.nan, dtype=np.float32)
    at = swizzled()
    for program in np.ndindex(down, splits, -(-m // block)):
        begin = kernel.split_begin.fn(program[1], across, splits)
        end = kernel.split_begin.fn(program[1] + 1, across, splits)
        first = program[2] * block
        acc = np.zeros((64, block), dtype=np.float32)
        for i in range(begin, end):
            tile = np.zeros(64 * 256, dtype=np.uint16)
            index = program[0] * across + i
            for g in range(kernel.group_count(chunks)):
                start, size = kernel.group_start(chunks, g), kernel.group_size(chunks, g)
                scatter_group(
                    tile,
                    load_words(values, index * chunks * 512 + start * 512, 8, size),
                    load_words(places, index * chunks * 256 + start * 256, 4, size),
                )
            dense = torch.from_numpy(tile[at].view(np.int16)).view(packed.values.dtype)
            seen = np.zeros((block, 256), dtype=np.float32)
            token, column = np.indices(seen.shape)
            inside = (first + token < m) & (i * 256 + column < k)
            seen[inside] = numbers[first + token[inside], i * 256 + column[inside]]
            acc += dense.float().numpy() @ seen.T
        row, token = np.indices(acc.shape)
        row += program[0] * 64
        inside = (row < n) & (first + token < m)
        out = (program[1] * m + first) * n + token * n + row
        assert np.isnan(partials[out[inside]]).all(), "written twice"
        partials[out[inside]] = acc[inside]
    return partials.reshape(splits, m, n)


def reduce(partials: np.ndarray) -> np.ndarray:
    """What `reduce_kernel` adds: splits in order, [M, N]."""
    acc = partials[0].copy()
    for part in partials[1:]:
        acc += part
    return acc
