"""What a recipe names: a score and a repair, with their options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, model_serializer, model_validator

from graphprune.options import Data, nearest
from graphprune.passes.repair import REPAIRS
from graphprune.passes.scores import SCORES

if TYPE_CHECKING:
    from graphprune.passes.repair.protocol import Repair

AUTO = "auto"
"""The score, or the repair, that a run chooses itself."""

UNREPAIRED = (AUTO, "none")
"""What may stand in place of a repair."""


def _score_name(word: str) -> str:
    return word if word == AUTO else SCORES.known(word)


def _repair_name(word: str) -> str:
    if word in UNREPAIRED:
        return word
    if word not in REPAIRS.names():
        valid = (*UNREPAIRED, *REPAIRS.names())
        raise ValueError(f"unknown repair '{word}'; {nearest(word, valid)}")
    return word


class Score(Data):
    """How a unit's importance is computed.

    Attributes:
        name: ``magnitude``, ``random``, a score of gradients (``taylor``, ``element1``,
            ``element2``, ``element-mix``, ``vector``) or of activations (``minitron``, ``flap``,
            ``wanda-sp``), which need calibration data, the score of another package, or ``auto``:
            obs wherever there is data, which language models have, and magnitude where there is
            none. Its options are further keys: ``norm: l1`` for magnitude.
    """

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, AfterValidator(_score_name)]

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        options = {k: v for k, v in (self.model_extra or {}).items() if v is not None}
        if options and self.name == AUTO:
            raise ValueError(f"score '{AUTO}' has no option '{next(iter(options))}'")
        if options:  # imports torch
            SCORES.build(self.name, options)
        return self

    @property
    def needs_data(self) -> bool:
        """Whether it says that it wants calibration data.

        Raises:
            PlanError: it can't be loaded.
        """
        return SCORES.needs_data(self.name)


class Repairing(Data):
    """How the weights that read what goes make up for it.

    Attributes:
        name: ``reconstruct``, ``bias``, the repair of another package, ``none``, or ``auto``. Its
            options are further keys: ``damping: 0.01`` for reconstruct.
    """

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, AfterValidator(_repair_name)]

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        if self.model_extra and self.name in UNREPAIRED:
            raise ValueError(f"repair '{self.name}' has no options")
        if self.model_extra:  # imports torch
            self.built()
        return self

    @model_serializer
    def _short(self) -> str | dict[str, Any]:
        return {"name": self.name, **self.model_extra} if self.model_extra else self.name

    @property
    def needs_data(self) -> bool:
        """Whether it says that it wants calibration data; see `Score.needs_data`."""
        return REPAIRS.needs_data(self.name)

    def built(self) -> Repair:
        """The repair with its options.

        Raises:
            ValueError: an option is unknown or has a wrong value.
        """
        return REPAIRS.build(self.name, self.model_extra or {})
