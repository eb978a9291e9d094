"""Which format is the fastest here, by measurement.

A layer is timed as a model runs it: with a weight in huge pages that isn't in a cache. Every
format takes its turns over the same number of copies, all of which together are larger than the
last cache. What was measured is kept in a table, a JSON file per machine, so that a layer of a
known size costs nothing.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import huge_pages, native
from .formats.files import FORMATS
from .formats.packed import FormatError, Packed
from .huge_pages import Arena
from .linear import SparseLinear

DENSE = "dense"
MARGIN = 1.03
"""How much faster than the dense layer a format has to be."""

COLD = 256 << 20  # bytes of dense weights that are gone through, more than a last-level cache
_TURNS = 15


@dataclass(frozen=True)
class Setting:
    """What a time is a function of.

    Attributes:
        rows, columns: of the weight.
        sparsity: percent of zeros, in steps of five, rounded down.
        blocks: percent of the blocks of 16 x 16 that aren't empty, in steps of ten, rounded up.
        slots: what the fullest strip of 256 columns needs; 0 on the processor, which has no kernel
            for strips.
        tokens: at once.
        dtype: of weight and tokens, without ``torch.``.
        device: its name.
        threads: of the processor; 0 on other devices.
    """

    rows: int
    columns: int
    sparsity: int
    blocks: int
    slots: int
    tokens: int
    dtype: str
    device: str
    threads: int

    @classmethod
    def of(cls, weight: Tensor, tokens: int) -> Setting:
        """The setting of a dense matrix on its device."""
        rows, columns = weight.shape
        zeros = 1 - int(weight.count_nonzero()) / weight.numel()
        cpu = weight.device.type == "cpu"
        threads = torch.get_num_threads() if cpu else 0
        dtype = str(weight.dtype).removeprefix("torch.")
        sparsity = int(zeros * 20) * 5
        blocks, slots = structure_of(weight)
        slots = 0 if cpu else slots
        device = device_name(weight.device)
        return cls(rows, columns, sparsity, blocks, slots, tokens, dtype, device, threads)

    @property
    def key(self) -> str:
        """It as text."""
        size = f"{self.rows}x{self.columns}"
        zeros = f"{self.sparsity}%, {self.blocks}% of blocks"
        zeros += f", {self.slots} slots" if self.slots else ""
        return f"{self.device}/{self.threads}/{self.dtype}/{size}/{zeros}/{self.tokens}"


def structure_of(weight: Tensor) -> tuple[int, int]:
    """The fields `blocks` and `slots` of a setting on a GPU; on a CPU `slots` is 0."""
    rows, columns = weight.shape
    kept = torch.nn.functional.pad(weight != 0, (0, -columns % 256, 0, -rows % 16))
    tiles = kept.view(-(-rows // 16), 16, -1, 16).any(3).any(1)
    share = int(tiles.sum()) / (-(-rows // 16) * -(-columns // 16))
    most = int(kept.view(len(kept), -1, 256).sum(2).max())
    return -(-int(share * 100) // 10) * 10, -(-most // 16) * 16


@cache
def device_name(device: torch.device) -> str:
    """A device with what computes on it: times of another are of no use."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    kernel = f"{native.variant()} {native.VERSION}" if native.available() else "no kernel"
    pages = ", huge pages" if huge_pages.available() else ""
    return f"{model}, {kernel}, torch {torch.__version__}{pages}"


@dataclass
class Table:
    """Measured times.

    Attributes:
        path: where they are kept; None to forget them.
        times: seconds by setting and format.
    """

    path: Path | None
    times: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def usual(cls) -> Table:
        """The one in the user's cache directory."""
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            return cls(None)
        return cls.open(Path(home) / "graphprune" / "kernels.json")

    @classmethod
    def open(cls, path: Path) -> Table:
        """A table from a file; an empty one if there is none, or it can't be read."""
        try:
            times = json.loads(path.read_text(encoding="utf-8"))
            fine = all(
                isinstance(v, float | int) and v > 0 for t in times.values() for v in t.values()
            )
        except (OSError, ValueError, AttributeError, RecursionError):
            return cls(path)
        return cls(path, times if fine else {})

    def keep(self, key: str, found: Mapping[str, float]) -> None:
        """Add times, and write the file where that is possible.

        Args:
            key: a `Setting.key`, or one that begins otherwise.
            found: seconds by format.
        """
        self.times.setdefault(key, {}).update(found)
        if self.path is None:
            return
        # What other processes have kept meanwhile stays; two at the same instant lose a time.
        self.times = {**Table.open(self.path).times, **self.times}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as holder:
                file = Path(holder) / self.path.name
                file.write_text(json.dumps(self.times, indent=1), encoding="utf-8")
                os.replace(file, self.path)
        except OSError:  # a home that is read-only costs time, not results
            self.path = None


def choose(
    weight: Tensor,
    tokens: Sequence[int] = (1,),
    formats: Sequence[str] | None = None,
    table: Table | None = None,
) -> str:
    """The name of the fastest format of a weight, or ``dense``.

    Args:
        weight: [rows, columns], with zeros, on the device where it is to run.
        tokens: numbers of tokens at once; the sum of their times counts.
        formats: to choose from; None for all that have a kernel there.
        table: of measured times; None for `Table.usual`.

    Returns:
        A format that is faster than a dense weight by more than `MARGIN`, or ``dense``.
    """
    table = table or Table.usual()
    formats = [f for f in (formats or worth_trying(weight)) if f != DENSE]
    total = dict.fromkeys([DENSE, *formats], 0.0)
    for count in tokens:
        setting = Setting.of(weight, count)
        known = table.times.get(setting.key, {})
        if any(f not in known for f in total):
            known = measure(weight, count, formats)
            table.keep(setting.key, known)
        for name in total:
            total[name] += known[name]
    best = min(total, key=lambda name: total[name])
    return best if total[best] * MARGIN < total[DENSE] else DENSE


def worth_trying(weight: Tensor) -> list[str]:
    """Formats with a kernel for a weight's device and dtype."""
    if weight.device.type == "cuda":
        small = weight.dtype in (torch.float16, torch.bfloat16)
        return ["bitmap", "strip_u8"] if small else ["bitmap"]
    found = []
    if native.available() and weight.dtype in native.TYPES:
        found.append("bitmap")
    if weight.dtype == torch.float32:
        found.append("csr")
        rows, columns = weight.shape
        if rows % 16 == 0 and columns % 16 == 0:
            found.append("block")
    return found


def measure(weight: Tensor, tokens: int, formats: Sequence[str]) -> dict[str, float]:
    """Time a layer in some formats and as a dense one.

    Args:
        weight: [rows, columns].
        tokens: at once.
        formats: names; one that can't hold the weight takes infinitely long.

    Returns:
        Median seconds by format, ``dense`` among them.
    """
    weight = weight.detach()
    copies = max(2, min(64, -(-COLD // (weight.numel() * weight.element_size()))))
    drawn = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = drawn.to(weight.device, weight.dtype)
    arena = Arena()
    dense = [arena.place(weight.clone()) for _ in range(copies)]
    calls: dict[str, list[Callable[[], Tensor]]] = {
        DENSE: [_dense(x, w) for w in dense],
    }
    found: dict[str, float] = {}
    for name in formats:
        try:
            packed = FORMATS[name].pack(weight)
        except FormatError:
            found[name] = float("inf")
            continue
        calls[name] = [_sparse(x, _copy(packed, arena)) for _ in range(copies)]
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(-copies, max(_TURNS, copies)):  # a first call prepares the kernel
            for name, each in calls.items():
                seconds = _timed(each[turn % copies], weight.device)
                if turn >= 0:
                    times[name].append(seconds)
    return found | {name: statistics.median(each) for name, each in times.items()}


def _copy(packed: Packed, arena: Arena) -> Packed:
    tensors = {name: arena.place(tensor.clone()) for name, tensor in packed.tensors().items()}
    return FORMATS[packed.format].of_tensors(packed.shape, tensors)


def _dense(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.linear(x, weight)


def _sparse(x: Tensor, packed: Packed) -> Callable[[], Tensor]:
    layer = SparseLinear(packed)
    return lambda: layer(x)


def _timed(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
