"""How a model is trained: options, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from graphprune.errors import RecipeError
from graphprune.options import nearest, parse_number

Kind = Literal["full", "norms", "lora"]
"""What trains of a model."""
LossName = Literal["ce", "kd", "kd+ce", "hidden", "values"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, BeforeValidator(parse_number), Field(ge=1)]

RATES: dict[str, float] = {"full": 2e-4, "norms": 1e-3, "lora": 1e-3, "frozen": 0.0}
"""Learning rates that do well over a few hundred steps, by what is trained."""


@dataclass(frozen=True)
class Training:
    """Options of a training run.

    Attributes:
        train: "full" trains all weights; "norms" vectors only, that is norms and biases; "lora" a
            product of two thin matrices that is added to each weight, which itself stays; "frozen"
            no weight, but what callbacks bring along.
        loss: "ce" is the cross-entropy of the labels, or of the next token; "kd" the divergence
            from the teacher's distribution; "kd+ce" the mean of both; "hidden" the distance from
            the teacher's values between layers; "values" that from outputs that are no logits,
            such as embeddings. None is "ce" without a teacher; with one it is "kd" for a language
            model, and "values" for any other.
        tokens: how many to train on.
        steps: optimiser steps.
        epochs: passes over the data; one, where neither tokens nor steps nor this is given.
        batch: samples (windows of text) in an optimiser step, over all processes.
        micro_batch: samples that go through the model together; None for all of a step's.
        lr: the highest learning rate; None for that of `RATES`.
        warmup: share of the steps in which the learning rate rises.
        falling: along what the learning rate falls after that: "cosine" or "linear".
        final: share of the learning rate that is left in the end.
        clip: largest norm of all gradients together; 0 for no limit.
        rank: columns of an adapter.
        alpha: an adapter's product counts ``alpha / rank`` times.
        dropout: share of the inputs that an adapter doesn't see in a forward pass.
        temperature: of both distributions in "kd".
        include: globs of the parameters to train; None for all that `train` means.
        exclude: globs of parameters that stay.
        also: what trains beside adapters: "biases", "norms".
        precision: of the products: "auto" is bfloat16 where the processor has it. Weights,
            gradients and the optimiser's state are float32 in any case; of a model in float64,
            float64.
        checkpointing: compute the activations of layers twice rather than keep them.
        fsdp: share weights, gradients and the optimiser's state among processes.
        seed: of the order of samples, adapters and dropout.
    """

    train: Literal[Kind, "frozen"] = "full"
    loss: LossName | None = None
    tokens: Count | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    epochs: Positive | None = None
    batch: Count = 8
    micro_batch: Count | None = None
    lr: NotNegative | None = None
    warmup: Share = 0.1
    falling: Literal["cosine", "linear"] = "cosine"
    final: Share = 0.1
    clip: NotNegative = 1.0
    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    temperature: Positive = 1.0
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    also: tuple[Literal["biases", "norms"], ...] = ()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool = False
    fsdp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            RecipeError: one is of another type or out of its range, or two contradict each other.
        """
        for field, adapter in _adapters().items():
            value = getattr(self, field)
            try:
                object.__setattr__(self, field, adapter.validate_python(value))
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                message = f"{message[:1].lower()}{message[1:]}, not {value!r}"
                raise RecipeError(f"training option '{field}': {message}") from None
        if sum(x is not None for x in (self.tokens, self.steps, self.epochs)) > 1:
            raise RecipeError("training takes tokens, steps or epochs, and one of them only")
        if self.also and self.train != "lora":
            raise RecipeError(
                f"training option 'also' says what trains beside adapters, not with {self.train}",
                hint="leave it out, or train: lora",
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with another model."""
        return self.loss not in (None, "ce")

    def settled(self, *, teacher: bool, causal: bool) -> Training:
        """The options with a loss.

        Args:
            teacher: whether there is one.
            causal: whether the model is a causal language model.
        """
        if self.loss is not None:
            return self
        return replace(self, loss=("kd" if causal else "values") if teacher else "ce")

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return RATES[self.train] if self.lr is None else self.lr

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step; see `share`."""
        return self.peak * self.share(step, steps)

    def share(self, step: int, steps: int) -> float:
        """The share of the highest learning rate that a step has: it rises linearly, then falls.

        Args:
            step: from 0.
            steps: of the whole run.
        """
        rising = max(1, int(self.warmup * steps))
        if self.falling == "linear":
            left = min(1.0, (steps - step) / max(1, steps - rising))
        else:
            left = (1 + math.cos(math.pi * step / steps)) / 2
        return min(1.0, (step + 1) / rising) * (self.final + (1 - self.final) * left)


def _adapters() -> dict[str, TypeAdapter[object]]:
    """What checks each option."""
    if not _known:
        hints = get_type_hints(Training, include_extras=True)
        _known.update((f.name, TypeAdapter(hints[f.name])) for f in fields(Training))
    return _known


_known: dict[str, TypeAdapter[object]] = {}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llm-pruner": {
        "train": "lora",
        "loss": "ce",
        "epochs": 2,
        "batch": 64,
        "micro_batch": 4,
        "lr": 1e-4,
        "warmup": 100 / 1556,
        "falling": "linear",
        "final": 0.0,
    }
}
"""Options by the name of a published recovery. LLM-Pruner's (Ma et al., 2023) trains adapters of
rank 8 for two passes over 50,000 instructions, of which 100 steps warm up."""

LLM_PRUNER = Training(**PRESETS["llm-pruner"])
"""LLM-Pruner's recovery with its published settings."""


def with_preset(options: object) -> object:
    """Options in which ``preset`` is replaced by what it stands for, beside what else is given.

    Args:
        options: of a recovery, or the name of a preset; everything else is given back.

    Raises:
        ValueError: there is no such preset.
    """
    if isinstance(options, str):
        options = {"preset": options}
    if not isinstance(options, Mapping) or options.get("preset") is None:
        return options
    given = {name: value for name, value in options.items() if name != "preset"}
    name = options["preset"]
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {nearest(str(name), PRESETS)}")
    preset = dict(PRESETS[name])
    if not {"tokens", "steps", "epochs"}.isdisjoint(given):
        del preset["epochs"]
    return preset | given
