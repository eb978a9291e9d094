"""The entries of ``steps``: passes with their options, in the order in which they are to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from graphprune.options import Data, bare, nearest
from graphprune.passes.repair import REPAIRS
from graphprune.passes.turn import Round
from graphprune.recipe.mistakes import explain
from graphprune.recipe.named import AUTO, UNREPAIRED, Repairing
from graphprune.recipe.selection import Selection
from graphprune.recipe.sparsify import Sparsify
from graphprune.registry import Registry

if TYPE_CHECKING:
    from graphprune.passes.protocol import Pass

_HERE = "graphprune.pipeline.steps"

PASSES: Registry[Pass] = Registry(
    "pass",
    "graphprune.passes",
    {
        "grasp": "graphprune.pipeline.gradual.grasp:Grasp",
        "loraprune": "graphprune.pipeline.gradual.loraprune:LoRAPrune",
        "match": f"{_HERE}.match:MatchBlocks",
        "recover": f"{_HERE}.recover:Recover",
        "repair": f"{_HERE}.repair:Repair",
        "replay": f"{_HERE}.replay:Replay",
        "select": f"{_HERE}.select:Select",
        "shear": "graphprune.pipeline.gradual.shear:Shear",
        "sparsify": f"{_HERE}.sparsify:Sparsified",
    },
)
"""What a step may be. Other packages add passes with an entry point of the group
``graphprune.passes`` whose name is the pass's and whose value is its class, a frozen dataclass
whose fields are the options; see `graphprune.passes.protocol.Pass`."""


LEARNING = ("grasp", "loraprune", "shear")
"""Those that choose units in the course of a training."""

REMOVING = ("select", "replay", *LEARNING)
"""Those that remove structures."""


class Replayed(Data):
    """The options of ``replay``.

    Attributes:
        plan: Path of a saved plan.
    """

    plan: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Planned:
    """A pass that is to run.

    Attributes:
        name: as recipes have it.
        options: the section of one of ours; a mapping for a pass of another package.
        round: the turn that it is of.
    """

    name: str
    options: Any
    round: Round = field(default_factory=Round)

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration data; a score that is still open may."""
        if isinstance(self.options, Selection):
            return self.options.score.name == AUTO or self.options.score.needs_data
        if isinstance(self.options, Mapping):
            return PASSES.needs_data(self.name)
        return not isinstance(self.options, Replayed) and bool(self.options.needs_data)

    @property
    def fits_weights(self) -> bool:
        """Whether it looks at data to change weights, which takes long."""
        if isinstance(self.options, Selection):
            return self.options.operates
        return isinstance(self.options, Repairing) or self.needs_data

    def with_names(self, names: Mapping[str, str]) -> Planned:
        """It with further roles of one's own, if it selects anything."""
        if not names or not isinstance(self.options, Selection):
            return self
        update = {"names": {**names, **self.options.names}}
        return replace(self, options=self.options.model_copy(update=update))


def _entry(value: object) -> object:
    """An entry as a mapping, in which a preset of ``recover`` is written out."""
    if isinstance(value, Mapping) and "recover" in value:
        return {**value, "recover": written_out(value["recover"])}
    return {value: {}} if isinstance(value, str) else value


def written_out(options: object) -> object:
    """The options of ``recover`` with what a preset of it stands for.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(options, str | Mapping):
        return options
    from graphprune.training.core.options import with_preset  # imports torch

    return with_preset(options)


class Step(Data):
    """One entry of ``steps``: the name of a pass, and its options.

    Attributes:
        select: Choose which units stay.
        replay: Take a saved plan.
        repair: Refit the weights that read what goes.
        sparsify: Make single weights zero.
        repeat: Several steps, several times.
    """

    model_config = ConfigDict(extra="allow")

    select: Selection | None = None
    replay: Annotated[Replayed, bare("plan")] | None = None
    repair: Annotated[Repairing, bare("name")] | None = None
    sparsify: Annotated[Sparsify, bare("method")] | None = None
    repeat: Repeat | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [*self.model_fields_set]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"a step names one pass, and this one has {found}")
        (name,) = given
        if name in type(self).model_fields:
            if getattr(self, name) is None:
                raise ValueError(f"'{name}' has no options; write {name}: {{...}}")
            if self.repair is not None and self.repair.name in UNREPAIRED:
                raise ValueError(f"a step names its repair: {', '.join(REPAIRS.names())}")
        else:
            own = dict.fromkeys((*type(self).model_fields, *PASSES.names()))
            if name not in own:
                raise ValueError(f"unknown pass '{name}'; {nearest(name, own)}")
            PASSES.build(name, self.options)
        return self

    @property
    def name(self) -> str:
        """The name of its pass."""
        (name,) = self.model_fields_set
        return name

    @property
    def options(self) -> Any:
        """The section of one of ours; a mapping for a pass of another package."""
        found = getattr(self, self.name)
        return (found or {}) if self.name not in type(self).model_fields else found

    def planned(self) -> tuple[Planned, ...]:
        """The passes that it stands for."""
        return self.repeat.planned() if self.repeat else (Planned(self.name, self.options),)

    def settled(self, change: Callable[[Planned], Planned]) -> Step:
        """The step with each of its passes changed, in order."""
        if self.repeat is not None:
            return self.model_copy(update={"repeat": self.repeat.settled(change)})
        (one,) = self.planned()
        return self.model_copy(update={self.name: change(one).options})


class Repeat(Data):
    """Steps that run several times.

    A number in the options of a step may be a list of as many numbers as there are rounds, which
    is what it is in each. A goal or a sparsity that is one number is reached in equal ratios: each
    round removes the same fraction of what is left.

    Attributes:
        rounds: How often.
        steps: What is repeated.
    """

    rounds: Annotated[int, Field(ge=1, le=1000)]
    steps: Annotated[list[Any], Field(min_length=1)]
    _turns: tuple[tuple[Planned, ...], ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _each_turn_is_valid(self, info: ValidationInfo) -> Self:
        turns = []
        for number in range(1, self.rounds + 1):
            turn: list[Planned] = []
            for entry in self.steps:
                chosen = _of_turn(_entry(entry), number - 1, self.rounds)
                try:
                    step = Step.model_validate(chosen, context=info.context)
                except ValidationError as error:
                    raise ValueError(explain(error.errors()[0], Step)) from None
                if step.repeat is not None:
                    raise ValueError("a repeat has no repeat in it")
                given = chosen != _entry(entry)
                turn.append(Planned(step.name, step.options, Round(number, self.rounds, given)))
            turns.append(tuple(turn))
        self._turns = tuple(turns)
        return self

    def planned(self) -> tuple[Planned, ...]:
        """The passes of all rounds, in order."""
        return tuple(one for turn in self._turns for one in turn)

    def settled(self, change: Callable[[Planned], Planned]) -> Repeat:
        """It with each pass of each round changed, in order."""
        found = self.model_copy()
        found._turns = tuple(tuple(map(change, turn)) for turn in self._turns)
        return found


def _of_turn(value: Any, index: int, rounds: int) -> Any:
    """Options with the entry of one turn in place of each list of numbers."""
    if isinstance(value, Mapping):
        return {key: _of_turn(entry, index, rounds) for key, entry in value.items()}
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(_is_number, value)):
        return value
    if len(value) != rounds:
        raise ValueError(f"{list(value)} has {len(value)} numbers for {rounds} rounds")
    return value[index]


def _is_number(value: object) -> bool:
    """Whether it is a number, or a text such as 50%, 1/3 or 2:4."""
    return isinstance(value, int | float) or (
        isinstance(value, str) and bool(value) and set(value) <= set("0123456789.%/:")
    )


Steps = tuple[Annotated[Step, BeforeValidator(_entry)], ...]
"""The entries of ``steps``."""
