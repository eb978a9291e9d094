"""The recipe: what to remove, how to choose it, and what to write, as one validated piece of data.

A recipe is YAML, a mapping, or a handful of command-line flags; all three end as a frozen
:class:`Recipe`. Everything that can be wrong without looking at a model is caught here, and an
unknown key, role or score is an error that names the nearest valid one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from graphprune.calibration.sources.section import Calibration
from graphprune.errors import RecipeError
from graphprune.files.yaml import read_yaml
from graphprune.options import Data, bare, listed, one_of, parse_number
from graphprune.passes.turn import Round
from graphprune.quality.conditions import Condition
from graphprune.recipe.flags import with_flags
from graphprune.recipe.mistakes import explain
from graphprune.recipe.named import AUTO, UNREPAIRED, Repairing
from graphprune.recipe.order import check_order
from graphprune.recipe.rules import changed, check_alone, check_together
from graphprune.recipe.selection import NAMES, WHAT, Goal, Selection
from graphprune.recipe.shipped import recipe_file
from graphprune.recipe.sparsify import Sparsify
from graphprune.recipe.steps import PASSES, REMOVING, Planned, Replayed, Steps, written_out

FORMATS = ("hf", "onnx", "onnx-decoder", "pt2")
GOALS = (*WHAT, "plan")

_TOLD = 10
"""Mistakes of a recipe that are told at once."""

ConditionText = Annotated[str, AfterValidator(lambda text: Condition.parse(text).text)]
FormatName = Annotated[str, one_of("format", FORMATS)]


def _switched(value: object) -> object:
    """True as no options, and False as nothing."""
    return {} if value is True else None if value is False else value


def _device_name(name: str) -> str:
    """What may be a device's name; whether it is there is seen later, by torch."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*(:[0-9]+)?", name):
        raise ValueError(f"{name!r} is no device; write auto, cpu, cuda or cuda:1")
    return name


Options = Annotated[dict[str, Any] | None, BeforeValidator(_switched)]
"""Options of a pass, true for none of them."""


class Verification(Data):
    """How the slim model is compared with the masked one.

    Attributes:
        dtype: ``auto`` is float64 where that fits.
        tolerance: Difference accepted, in parts of max(1, largest value of the output); None for
            1e-9 in float64 and 1e-4 in float32.
    """

    dtype: Literal["auto", "float32", "float64"] = "auto"
    tolerance: Annotated[float, Field(gt=0)] | None = None


class Recipe(Goal):
    """What to do with a model, and what to write.

    `steps` say it as a list of passes. Without them the other entries do: at most one of remove,
    target, shape and plan is given, and one of them or sparsify. Structures are removed first, then
    the weights that read them are repaired, single weights of what is left become zero, and
    what is left is trained.

    Attributes:
        plan: Path of a saved plan to replay.
        sparsify: Which single weights become zero; a bare word stands for ``{method: ...}``.
        match: Train each block on what the dense block computes; options of
            `graphprune.passes.match.Match`, or true.
        recover: Train what is left; options of `graphprune.pipeline.steps.recover.Recover`, the
            name of a preset (``llm-pruner``), or true.
        effort: How much time a good result is worth: ``fast`` ranks units by a score and leaves
            all weights as they are, ``usual`` refits what reads them, ``balanced`` matches blocks
            too, ``best`` matches and recovers. None is usual, and a short training where a budget
            takes more than half of some role from a language model.
        control: Whether what training is compared with is made too, and measured beside the result:
            the model without training, the dense model trained alike, and, where there are rounds,
            one cut trained alike. None of them is written.
        steps: What to do, pass by pass, instead of all that is about structures and weights here.
        calibration: Data for what needs it, and text to measure the perplexity on.
        rounds: Number of select-and-apply rounds.
        seed: Random seed, of everything that is drawn.
        device: Where weights are calibrated and solved: ``auto`` (CUDA where there is any, or
            another accelerator that PyTorch finds, else the processor), ``cpu``, ``cuda``,
            ``cuda:1``.
        memory: Bytes of that device that may be taken; None for all that are free.
        formats: What to write: ``hf``, ``onnx``, ``onnx-decoder`` (with key-value cache), ``pt2``.
        verify: How the result is checked.
        native: What to do if no native Hugging Face config can hold the plan: ``require`` refuses,
            ``prefer`` writes a self-contained form with a warning.
        repair: How the weights that read what goes make up for it: ``reconstruct`` fits them anew,
            ``bias`` adds the average of what goes to biases, ``none`` leaves them (score obs has
            refits of its own), and ``auto`` is reconstruct where the score was auto and has become
            obs for a model that is no language model, and none elsewhere.
        fail_if: Conditions on the result under which nothing is written: ``perplexity>+50%``; see
            `graphprune.quality.conditions`.
    """

    plan: Annotated[str, Field(min_length=1)] | None = None
    sparsify: Annotated[Sparsify, bare("method")] | None = None
    match: Options = None
    recover: Annotated[Options, BeforeValidator(written_out)] = None
    effort: Literal["fast", "usual", "balanced", "best"] | None = None
    control: bool = False
    steps: Steps | None = None
    calibration: Calibration = Calibration()
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    device: Annotated[str, AfterValidator(_device_name)] = "auto"
    memory: Annotated[int, BeforeValidator(parse_number), Field(ge=1)] | None = None
    formats: Annotated[tuple[FormatName, ...], BeforeValidator(listed), Field(min_length=1)] = (
        "hf",
    )
    verify: Verification = Verification()
    native: Literal["require", "prefer"] = "prefer"
    repair: Annotated[Repairing, bare("name")] = Repairing(name=AUTO)
    fail_if: Annotated[tuple[ConditionText, ...], BeforeValidator(listed)] = ()

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.control and not any(one.name == "recover" for one in self.passes):
            raise ValueError(
                "'control' trains what training is compared with, and nothing is trained here; "
                "add recover, or leave it out"
            )
        if self.steps is not None:
            if not self.steps:
                raise ValueError("'steps' is empty: name a pass, such as select")
            check_alone(changed(self))
            check_order(self.passes)
            return self
        given = [goal for goal in GOALS if getattr(self, goal) is not None]
        trains = [name for name in ("match", "recover") if getattr(self, name) is not None]
        for name in trains:  # imports torch
            PASSES.build(name, getattr(self, name))
        if len(given) > 1 or not (given or self.sparsify or trains):
            found = f"this one has {' and '.join(given)}" if given else "this one has none"
            wanted = "at most" if self.sparsify else "exactly"
            also = "" if given or self.sparsify else ", or sparsify, or steps"
            raise ValueError(f"a recipe has {wanted} one of {', '.join(GOALS)}{also}; {found}")
        check_together(changed(self), removes=bool(given), score=self.score.name)
        return self

    @property
    def passes(self) -> tuple[Planned, ...]:
        """What is done, in order, however the recipe says it."""
        if self.steps is not None:
            listed = (one for step in self.steps for one in step.planned())
            return tuple(one.with_names(self.names) for one in listed)
        found: list[Planned] = []
        if self.plan is not None:
            found.append(Planned("replay", Replayed(plan=self.plan)))
        elif any(self.goals.values()):
            goal = Selection.model_construct(**{n: getattr(self, n) for n in Goal.model_fields})
            for number in range(1, self.rounds + 1):
                found.append(Planned("select", goal, Round(number, self.rounds)))
        if found and self.repair.name not in UNREPAIRED:
            found.append(Planned("repair", self.repair))
        if self.sparsify is not None:
            found.append(Planned("sparsify", self.sparsify))
        for name in ("match", "recover"):
            if getattr(self, name) is not None:
                found.append(Planned(name, getattr(self, name)))
        return tuple(found)

    @property
    def own_names(self) -> dict[str, str]:
        """Selector to a role of one's own, of all passes."""
        return {k: v for one in (self, *self.selections) for k, v in one.names.items()}

    @property
    def selections(self) -> tuple[Selection, ...]:
        """How units are chosen, where they aren't those of a saved plan."""
        return tuple(p.options for p in self.passes if isinstance(p.options, Selection))

    @property
    def plans(self) -> tuple[str, ...]:
        """The paths of saved plans."""
        return tuple(p.options.plan for p in self.passes if isinstance(p.options, Replayed))

    @property
    def repairings(self) -> tuple[Repairing, ...]:
        """How weights are made to make up for structures that go."""
        return tuple(p.options for p in self.passes if isinstance(p.options, Repairing))

    @property
    def masks(self) -> tuple[Sparsify, ...]:
        """How single weights become zero."""
        return tuple(p.options for p in self.passes if isinstance(p.options, Sparsify))

    @property
    def removes(self) -> bool:
        """Whether structures are removed."""
        return any(one.name in REMOVING for one in self.passes)

    @property
    def score_needs_data(self) -> bool:
        """Whether a score says that it wants calibration data; `auto` is none as yet.

        Raises:
            PlanError: the score doesn't take its options, or can't be loaded.
        """
        return any(s.score.name != AUTO and s.score.needs_data for s in self.selections)

    @property
    def repairs(self) -> bool:
        """Whether weights are changed to make up for structures that go."""
        return bool(self.repairings)

    @property
    def repairs_on_data(self) -> bool:
        """Whether a repair looks at calibration data."""
        return any(one.needs_data for one in self.repairings)

    @property
    def leaves_training(self) -> bool:
        """Whether nothing is said of training, nor of how units are chosen or weights masked."""
        told = (self.effort, self.steps, self.match, self.recover)
        return not any(x is not None for x in told) and self.score.name == AUTO and not self.masks

    @property
    def masks_on_data(self) -> bool:
        """Whether masks look at calibration data."""
        return any(one.needs_data for one in self.masks)

    @property
    def operates(self) -> bool:
        """Whether units are chosen while weights are refitted."""
        return any(one.operates for one in self.selections)

    @property
    def needs_data(self) -> bool:
        """Whether a pass may want calibration data."""
        return any(one.needs_data for one in self.passes if not _is_open(one))

    def replaced(self, **entries: object) -> Self:
        """The recipe with other values, which are valid already, for some entries."""
        return self.model_copy(update=entries)

    @classmethod
    def parse(cls, data: object, where: str = "the recipe") -> Recipe:
        """Validates plain data.

        Raises:
            RecipeError: It is not a mapping, or a key or value is wrong; every mistake is listed.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(
                "the recipe is not a mapping",
                where=where,
                why=f"it is {'empty' if data is None else type(data).__name__}",
                hint="start with a line such as 'remove: {ffn: 0.25}'",
            )
        try:
            names = data.get(NAMES)
            context = {NAMES: names} if isinstance(names, Mapping) else None
            return cls.model_validate(dict(data), context=context)
        except ValidationError as error:
            found = error.errors()
        mistakes = [explain(cast("Mapping[str, Any]", item), cls) for item in found[:_TOLD]]
        if len(found) > _TOLD:
            mistakes.append(f"and {len(found) - _TOLD} more")
        raise RecipeError(
            "the recipe is not valid" if len(mistakes) > 1 else mistakes[0],
            where=where,
            why="; ".join(mistakes) if len(mistakes) > 1 else None,
        )

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a YAML file; a bare name may be that of one that comes with the package.

        Raises:
            RecipeError: The file is missing, is not YAML, or is not a valid recipe.
        """
        return cls.parse(read_yaml(recipe_file(path)), where=str(path))

    @classmethod
    def from_flags(cls, path: str | Path | None, flags: Mapping[str, object]) -> Recipe:
        """Joins a YAML file, if there is one, with command-line flags; a flag wins.

        Args:
            path: Of the file, or the name of one that comes with the package.
            flags: See `graphprune.recipe.flags.with_flags`.

        Raises:
            RecipeError: A word is not ``key=number``, or the result is not a valid recipe.
        """
        base: object = {} if path is None else read_yaml(recipe_file(path))
        where = "the command line" if path is None else str(path)
        return cls.parse(with_flags(base, flags), where)

    def to_yaml(self) -> str:
        """Renders what differs from the defaults; :meth:`load` reads it back."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False)


def _is_open(one: Planned) -> bool:
    """Whether the score of a selection is still to be chosen."""
    return isinstance(one.options, Selection) and one.options.score.name == AUTO
