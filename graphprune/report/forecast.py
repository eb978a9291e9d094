"""What a dry run says of the real one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


@dataclass(frozen=True)
class Size:
    """Structures of one role that are cut alike.

    Attributes:
        role: their role.
        structures: their names.
        before: units of each in the dense model.
        after: units that stay.
        shown: the names in short, "model.layers.{0..29}.mlp.up_proj.weight:0".
    """

    role: str
    structures: tuple[str, ...]
    before: int
    after: int
    shown: str


@dataclass(frozen=True)
class Forecast:
    """What a run is going to do, and about how long that takes.

    Attributes:
        sizes: what is cut, by role and size.
        data: what is calibrated on; None where nothing is.
        passes: what is done, in order.
        formats: what is written.
        form: what the Hugging Face files are, native or self-contained; None without them.
        seconds: about how long it takes here.
        memory: about how many bytes of memory it takes.
        zeros: single weights that become zero; None where none do.
        zeros_of: the weights that they are among.
        estimate: what calibration takes, in words; None where nothing is calibrated.
    """

    sizes: tuple[Size, ...]
    data: str | None
    passes: tuple[str, ...]
    formats: tuple[str, ...]
    form: str | None
    seconds: float
    memory: int
    zeros: int | None = None
    zeros_of: int | None = None
    estimate: str | None = None

    def render(self) -> RenderableType:
        """Returns the table of sizes and what else there is to say, for a rich console."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("role")
        for title in ("structures", "units", "stay"):
            table.add_column(title, justify="right")
        table.add_column("where", overflow="fold")
        for one in self.sizes:
            numbers = (f"{n:,}" for n in (len(one.structures), one.before, one.after))
            table.add_row(one.role, *numbers, Text(one.shown))
        return Group(*([table] if self.sizes else []), *(Text(line) for line in self._lines()))

    def _lines(self) -> list[str]:
        lines = []
        if self.zeros is not None and self.zeros_of:
            share = self.zeros / self.zeros_of
            lines.append(
                f"expected zeros: {self.zeros:,} of {self.zeros_of:,} weights, {share:.1%}"
            )
        lines.append(f"data: {self.data or 'none is needed'}")
        if self.estimate is not None:
            lines.append(self.estimate)
        lines.append("passes: " + "; ".join(self.passes))
        form = f" ({self.form})" if self.form else ""
        lines.append(f"writes: {', '.join(self.formats)}{form}")
        lines.append(
            f"takes about {about_time(self.seconds)} and {about_size(self.memory)} of memory"
        )
        return lines


def about_time(seconds: float) -> str:
    """A time of which only the order of magnitude is known: "40 seconds", "2 hours"."""
    for size, unit in _UNITS:
        if seconds >= 1.5 * size or size == 1:
            return f"{_rounded(max(seconds / size, 2))} {unit}"
    raise AssertionError


def about_size(size: float) -> str:
    """Likewise a size in memory: "700 MB", "3 GB"."""
    if size >= 1e9:
        return f"{max(1, _rounded(size / 1e9))} GB"
    return f"{max(1, _rounded(size / 1e6))} MB"


def _rounded(value: float) -> int:
    """A number to one digit, or two where the first is 1."""
    power = math.floor(math.log10(max(value, 1)))
    step = int(10 ** max(0, power - int(value < 2 * 10**power)))
    return round(value / step) * step
