"""One model's numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from graphprune.quality.perplexity import Perplexity
from graphprune.quality.timing import Latency


@dataclass(frozen=True)
class Measures:
    """One model's numbers; None is a number that was not taken.

    Attributes:
        parameters: A tied parameter counts once.
        macs: Multiply-accumulates of one call, with the input that latencies are taken with too.
        bytes: Of the weights, which are the parameters and the buffers that are stored with them.
        files: Bytes of the files of weights, or of the ONNX or .pt2 file, on disk.
        torch: Latency in PyTorch.
        onnxruntime: Latency in ONNX Runtime.
        perplexities: Of a language model, by the text that they were measured on.
        input: The input that MACs and latencies are of, in words: "1 x 128 tokens".
        inputs: Its shapes, by name.
        notes: What the reader should know of these numbers.
    """

    parameters: int | None = None
    macs: int | None = None
    bytes: int | None = None
    files: int | None = None
    torch: Latency | None = None
    onnxruntime: Latency | None = None
    perplexities: dict[str, Perplexity] = field(default_factory=dict)
    input: str | None = None
    inputs: dict[str, tuple[int, ...]] | None = None
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> Perplexity | None:
        """On the first of the texts."""
        return next(iter(self.perplexities.values()), None)

    def as_data(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        first = self.perplexity
        return asdict(self) | {"perplexity": None if first is None else asdict(first)}
