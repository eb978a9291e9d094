"""Calibration samples as they are handed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What a model is calibrated on.

    Attributes:
        data: for `graphprune.streaming.batches`: token windows int64 ``[count, length]``, another
            tensor, a mapping of input name to tensor ``[count, ...]``, or a sequence of samples.
            For an ONNX model a mapping of input name to numpy array ``[count, ...]``, or a
            sequence of such mappings with one sample each.
        source: as the recipe names it.
        kind: text, token ids, images, recordings, arrays or a function's.
        count: number of samples.
        available: how many there were to take them from; None where that isn't known.
        length: tokens in each, where all are token windows of one length.
        tokens: all tokens, where there are any.
        split: of a data set, where it is known.
        seed: of the draw; None where the first were taken.
        in_domain: whether the perplexity is measured on the same text.
        notes: what there is to say of them.
        own: whether the model has written all of it itself, and so can't be judged by it.
        given: what of the data somebody has given, where general text has come beside it.
        domains: name to the numbers of the samples of each part of a mixture.
    """

    data: Any
    source: str
    kind: str
    count: int
    available: int | None = None
    length: int | None = None
    tokens: int | None = None
    split: str | None = None
    seed: int | None = None
    in_domain: bool = False
    notes: tuple[str, ...] = ()
    own: bool = False
    given: Tensor | None = None
    domains: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def judging(self) -> Any:
        """What the dense model has to make sense of."""
        return self.data if self.given is None else self.given

    @property
    def windows(self) -> Tensor | None:
        """The token windows ``[count, length]``, if that is all that the model reads."""
        tensor = isinstance(self.data, Tensor) and not self.data.is_floating_point()
        return self.data if tensor and self.data.dim() == 2 else None

    def as_data(self) -> dict[str, Any]:
        """All but the samples themselves, as plain data."""
        own = [f.name for f in fields(self) if f.name not in ("data", "domains")]
        return {name: getattr(self, name) for name in own}

    def described(self) -> str:
        """One line that says everything that a result depends on."""
        what = "window" if self.kind in ("text", "token ids") else "sample"
        what = what if self.count == 1 and self.available in (None, 1) else f"{what}s"
        of = "" if self.available is None else f" of {self.available}"
        size = f" of {self.length} tokens" if self.length else ""
        total = f" ({self.tokens} tokens)" if self.tokens else ""
        split = f", split {self.split}" if self.split else ""
        how = "the first" if self.seed is None else f"drawn with seed {self.seed}"
        return (
            f"{self.count}{of} {what}{size}{total} from {self.source} ({self.kind}{split}), {how}"
        )
