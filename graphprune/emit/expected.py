"""What a checkpoint has to compute once it has been written and opened again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.rewrite.module.compare import EXACT, Example, deviation, rounding, run, run_exactly
from graphprune.rewrite.module.reload import OWN


@dataclass(frozen=True)
class Expected:
    """Outputs of the slim module, by the names that `graphprune.rewrite.module.reload` gives.

    Attributes:
        inputs: What they are for.
        outputs: For the first inputs in the model's own dtype, "own/logits"; for each of them in
            `dtype`, "0/logits".
        dtype: float64, or float32 where memory is short; None for code that can't be run in it.
        tolerance: The difference that passes in the model's own dtype.
        whole: Whether a copy of the model is made in float64; see `run_exactly`.
    """

    inputs: Sequence[Example]
    outputs: Mapping[str, torch.Tensor]
    dtype: torch.dtype | None
    tolerance: float
    whole: bool = True

    @classmethod
    def of(cls, slim: Any) -> Expected:
        """Run the module of a :class:`graphprune.rewrite.slim.Slim`."""
        module, judge = slim.module, slim.judge
        dtype: torch.dtype | None = judge.dtype
        exact = judge.exact
        if isinstance(module, type(slim.program.module)):
            # Code that reads its dtype computes other things in another one, once loaded too.
            exact = judge.widened(module)
            dtype = None if exact is None else dtype
        found = _named(run(module, judge.inputs[0]), exact or ())
        return cls(judge.inputs, found, dtype, rounding(module), judge.whole)

    @property
    def dtype_name(self) -> str | None:
        """The name of `dtype`."""
        return None if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def deviation_of(self, module: nn.Module) -> str | None:
        """Say how the outputs of a loaded module differ from these."""
        own = run(module, self.inputs[0])
        exact: list[dict[str, torch.Tensor]] = []
        if self.dtype is not None:
            exact = [run_exactly(module, i, self.dtype, whole=self.whole) for i in self.inputs]
        return self.deviation(_named(own, exact))

    def deviation(self, found: Mapping[str, torch.Tensor]) -> str | None:
        """Say how outputs, under names like these, differ from these."""
        for name, expected in self.outputs.items():
            exact = None if name.startswith(OWN) else self.dtype
            tolerance = self.tolerance if exact is None else EXACT[exact]
            plain = name.partition("/")[2]
            given = {plain: found[name]} if name in found else {}
            wrong = deviation(given, {plain: expected}, tolerance)
            if wrong is not None:
                return wrong
        return None if self.outputs else "there are no outputs to compare"


def _named(
    own: Mapping[str, torch.Tensor], exact: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    found = {f"{OWN}{name}": tensor for name, tensor in own.items()}
    for i, outputs in enumerate(exact):
        found |= {f"{i}/{name}": tensor for name, tensor in outputs.items()}
    return found
