"""What packing did, for people and programs."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Layer:
    """A weight of a linear layer, or another one that has become smaller.

    Attributes:
        name: of the weight.
        shape: outputs and inputs.
        sparsity: its share of zeros.
        format: the format in the file; ``dense`` where it was left alone.
        dense_bytes: of the weight without a format.
        bytes: that it takes.
        why: why it was left alone, or computes as a dense one.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    format: str
    dense_bytes: int
    bytes: int
    why: str = ""


@dataclass(frozen=True)
class Packing:
    """All layers of a model.

    Attributes:
        source, output: the files or directories.
        layers: in the order of the model.
        bytes_before, bytes_after: of all weights, on disk.
    """

    source: str
    output: str
    layers: tuple[Layer, ...]
    bytes_before: int
    bytes_after: int

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def render(self) -> RenderableType:
        """As a table: layers of one kind in a row."""
        from rich.console import Group
        from rich.table import Table

        table = Table("weights", "outputs x inputs", "zeros", "format", "MB dense", "MB", "")
        for (shape, format, _), same in self._alike().items():
            whys = list(dict.fromkeys(e.why for e in same))
            why = whys[0] if len(whys) == 1 else f"for instance: {whys[0]}"
            zeros = sum(e.sparsity for e in same) / len(same)
            table.add_row(
                str(len(same)),
                f"{shape[0]} x {shape[1]}",
                f"{zeros:.0%}",
                format,
                f"{sum(e.dense_bytes for e in same) / 1e6:.1f}",
                f"{sum(e.bytes for e in same) / 1e6:.1f}",
                why,
            )
        total = (
            f"{self.bytes_before / 1e6:.1f} MB of weights became {self.bytes_after / 1e6:.1f} MB "
            f"({self.bytes_after / self.bytes_before:.0%}): {self.output}"
        )
        return Group(table, total)

    def _alike(self) -> dict[tuple[tuple[int, int], str, str], list[Layer]]:
        """Layers by shape, format and reason; reasons may differ in numbers."""
        found: dict[tuple[tuple[int, int], str, str], list[Layer]] = {}
        for e in self.layers:
            found.setdefault((e.shape, e.format, re.sub(r"\d+", "0", e.why)), []).append(e)
        return found
