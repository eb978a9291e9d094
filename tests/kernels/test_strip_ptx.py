"""What the strip kernel is compiled to, run instruction by instruction: see `ptx`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.kernels.formats.strip import Strip
from graphprune.kernels.gpu import gluon_api

if not gluon_api.AVAILABLE:
    pytest.skip(gluon_api.REASON, allow_module_level=True)

from kernels import ptx
from kernels.builds import shared_bytes, strip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def whole_numbers(rows: int, columns: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """Small enough for exact sums; as many in each strip as fit, and a row without any."""
    rank = torch.rand(rows, -(-columns // 256) * 256).unflatten(1, (-1, 256)).argsort(2).argsort(2)
    numbers = torch.randint(1, 4, (rows, columns)) * (torch.randint(0, 2, (rows, columns)) * 2 - 1)
    weight = numbers.where((rank < slots).flatten(1)[:, :columns], 0)
    weight[rows // 2] = 0
    return weight.to(dtype)


def run(text: str, x: torch.Tensor, packed: Strip, block: int, splits: int) -> torch.Tensor:
    """Partial sums, [splits, tokens, rows]; NaN where nothing is written."""
    (rows, columns), (down, across) = packed.shape, packed.values.shape[:2]
    partials = np.full((splits, len(x), rows), np.nan, dtype=np.float32)
    stored = torch.as_strided(x, ((len(x) - 1) * x.stride(0) + columns,), (1,))
    arguments = [
        stored.view(torch.int16).numpy(),
        packed.values.flatten().view(torch.int32).numpy(),
        packed.places.flatten().view(torch.int32).numpy(),
        partials,
        *(len(x), rows, columns, x.stride(0), across, splits),
    ]
    grid = (down, splits, -(-len(x) // block))
    ptx.launch(text, grid, arguments, shared_bytes(block))
    return torch.from_numpy(partials)


@pytest.mark.parametrize(
    ("architecture", "dtype", "rows", "columns", "slots", "tokens", "splits", "spare"),
    [
        (80, "bf16", 64, 512, 128, 8, 1, 0),
        (90, "fp16", 70, 300, 112, 3, 2, 4),
        (90, "bf16", 128, 512, 48, 16, 2, 16),
        (100, "bf16", 65, 1000, 80, 1, 3, 8),
        (80, "bf16", 64, 1300, 96, 20, 2, 12),
        (90, "bf16", 64, 768, 256, 33, 1, 0),
        (80, "fp16", 1, 37, 16, 70, 1, 11),
    ],
)
def test_partial_sums(architecture, dtype, rows, columns, slots, tokens, splits, spare):
    torch.manual_seed(slots)
    weight = whole_numbers(rows, columns, slots, DTYPES[dtype])
    packed = Strip.pack(weight, slots)
    # Columns after the last one must not be read.
    x = torch.full((tokens, columns + spare), float("nan"), dtype=DTYPES[dtype])
    x[:, :columns] = torch.randint(-3, 4, (tokens, columns))
    x = x[:, :columns]
    block = min(64, max(8, 1 << (tokens - 1).bit_length()))
    aligned = rows % 16 == columns % 16 == 0
    text = strip(architecture, dtype, block, slots, aligned).ptx
    partials = run(text, x, packed, block, splits)
    assert torch.equal(partials.sum(0).double(), x.double() @ weight.double().T)
    width = packed.values.shape[1]
    for s, part in enumerate(partials):
        of_split = slice(s * width // splits * 256, (s + 1) * width // splits * 256)
        assert torch.equal(part.double(), x[:, of_split].double() @ weight[:, of_split].double().T)


def lines_without(text: str, wanted: str) -> list[str]:
    """The program without one of the instructions, for each of those."""
    lines = text.splitlines()
    found = [i for i, line in enumerate(lines) if wanted in line]
    return ["\n".join(line for i, line in enumerate(lines) if i != one) for one in found]


def test_every_barrier_is_needed():
    """So that the search for races is known to find them."""
    torch.manual_seed(0)
    packed = Strip.pack(whole_numbers(64, 768, 64, torch.float16), 64)
    x = torch.ones(8, 768).half()
    damaged = lines_without(strip(90, "fp16", 8, 64).ptx, "bar.sync")
    assert len(damaged) == 6  # of the loop and of the last tile: before and after zeros, scattered
    for text in damaged:
        with pytest.raises(AssertionError, match="without a barrier"):
            run(text, x, packed, 8, 1)


@pytest.mark.parametrize("instruction", ["wait_group", "commit_group"])
def test_tokens_are_waited_for(instruction: str):
    packed = Strip.pack(torch.ones(64, 512).half(), 256)
    x = torch.ones(8, 512).half()
    (text,) = lines_without(strip(90, "fp16", 8, 256).ptx, instruction)
    with pytest.raises(AssertionError):
        run(text, x, packed, 8, 1)


def test_every_place_is_needed():
    """So that a wrong instruction is known to be noticed."""
    torch.manual_seed(0)
    weight = whole_numbers(64, 256, 64, torch.float16)
    x = torch.randint(1, 4, (8, 256)).half()
    text = strip(90, "fp16", 8, 64).ptx
    third = f", {2 << 16}, "  # the dot product that takes the third byte of a word
    assert text.count(third) == 2 * 8
    head, _, tail = text.rpartition(third)
    partials = run(f"{head}, {2 << 24}, {tail}", x, Strip.pack(weight, 64), 8, 1)
    assert not torch.equal(partials.sum(0).double(), x.double() @ weight.double().T)


def test_reading_beyond_a_buffer_is_noticed():
    packed = Strip.pack(torch.ones(64, 256).half(), 256)
    short = Strip(packed.shape, packed.values[:, :, :15], packed.places)
    text = strip(90, "fp16", 8, 256).ptx
    with pytest.raises(AssertionError, match="outside of global memory"):
        run(text, torch.ones(8, 256).half(), short, 8, 1)
