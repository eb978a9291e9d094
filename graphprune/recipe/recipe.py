"""The recipe: what to remove, how to choose it, and what to write, as one validated piece of data.

A recipe is YAML, a mapping, or a handful of command-line flags; all three end as a frozen
:class:`Recipe`. Everything that can be wrong without looking at a model is caught here, and an
unknown key, role or score is an error that names the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from graphprune.analysis.roles import ROLES as OWN_ROLES
from graphprune.calibration.sources.section import FORMS, Calibration, Part
from graphprune.errors import RecipeError
from graphprune.files.yaml import read_yaml
from graphprune.options import Data, bare, listed, nearest, one_of, parse_number, removed_fraction
from graphprune.passes.selection.alignment import alignment_words, parse_alignment
from graphprune.plan.selector import HEADS, Selector
from graphprune.quality.conditions import Condition
from graphprune.recipe.named import AUTO, UNREPAIRED, Repairing, Score
from graphprune.recipe.rules import check_together
from graphprune.recipe.sparsify import Sparsify

_BEFORE = OWN_ROLES.index("kv_heads")
ROLES = (*OWN_ROLES[:_BEFORE], HEADS, *OWN_ROLES[_BEFORE:])
"""The roles that a recipe may name beside its own; for ``heads`` see `graphprune.plan.selector`."""

FORMATS = ("hf", "onnx", "onnx-decoder", "pt2")
BUDGETS = ("params", "macs", "bytes")
GOALS = ("remove", "target", "shape", "plan")

_TOLD = 10
"""Mistakes of a recipe that are told at once."""


def _budget(value: object) -> int | float:
    number = parse_number(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} is not a budget: it must be positive")
    if number <= 1:
        return float(number)
    if number != int(number):
        raise ValueError(
            f"{value!r} is neither a fraction of the dense model (at most 1) nor a whole number"
        )
    return int(number)


def _minimum(value: object) -> int | float:
    number = parse_number(value)
    if isinstance(number, float) and 0 < number < 1:
        return number
    if not 1 <= number < float("inf") or number != int(number):
        raise ValueError(f"{value!r} is neither a number of units (>= 1) nor a fraction below 1")
    return int(number)


def _for_all_roles(value: object) -> object:
    return value if isinstance(value, Mapping) else {"*": value}


def _role(word: str, info: ValidationInfo) -> str:
    valid = (*ROLES, *dict.fromkeys(info.data.get("names", {}).values()))
    if word not in valid:
        raise ValueError(f"unknown role '{word}'; {nearest(word, valid)}")
    return word


def _role_or_all(word: str, info: ValidationInfo) -> str:
    return word if word == "*" else _role(word, info)


def _selector(word: str, info: ValidationInfo) -> str:
    selector = Selector.parse(word)
    if selector.role is not None:
        _role(selector.role, info)
    return word


def _removable(word: str, info: ValidationInfo) -> str:
    """A role, ``*``, or a selector that says by role or dimension which structures it means."""
    return _selector(word, info) if set(word) & set(":/") else _role_or_all(word, info)


def _word(word: str) -> str:
    if not word.isidentifier():
        raise ValueError(f"'{word}' is not a word that can name a role")
    return word


RoleName = Annotated[str, AfterValidator(_role)]
RoleOrAll = Annotated[str, AfterValidator(_role_or_all)]
Removable = Annotated[str, AfterValidator(_removable)]
OwnRole = Annotated[str, AfterValidator(_word)]
ConditionText = Annotated[str, AfterValidator(lambda text: Condition.parse(text).text)]
SelectorText = Annotated[str, AfterValidator(_selector)]
BudgetName = Annotated[str, one_of("budget", BUDGETS)]
FormatName = Annotated[str, one_of("format", FORMATS)]
Removed = Annotated[float, BeforeValidator(removed_fraction)]
Budget = Annotated[int | float, BeforeValidator(_budget)]
Aligned = Annotated[int, BeforeValidator(parse_alignment)]
Units = Annotated[int, BeforeValidator(parse_number), Field(ge=1)]
Selectors = Annotated[tuple[SelectorText, ...], BeforeValidator(listed)]


class Verification(Data):
    """How the slim model is compared with the masked one.

    Attributes:
        dtype: ``auto`` is float64 where that fits.
        tolerance: Difference accepted, in parts of max(1, largest value of the output); None for
            1e-9 in float64 and 1e-4 in float32.
    """

    dtype: Literal["auto", "float32", "float64"] = "auto"
    tolerance: Annotated[float, Field(gt=0)] | None = None


class Recipe(Data):
    """What to remove and what to write.

    At most one of remove, target, shape and plan is given, and one of them or sparsify. Structures
    are removed first; then single weights of what is left become zero.

    Attributes:
        names: Selector to a role of one's own for the structures that it means.
        remove: Fraction of the units of a role to remove; ``*`` is every prunable role. A selector
            (see `graphprune.plan.selector`) instead of a role sets it for what it means.
        target: Budget for the slim model: a fraction of the dense one (at most 1), or absolute.
        shape: Exact sizes of the slim model by role.
        plan: Path of a saved plan to replay.
        sparsify: Which single weights become zero; a bare word stands for ``{method: ...}``.
        score: How units are ranked; a bare name stands for ``{name: ...}``.
        aggregate: How the scores of the members of one unit are joined.
        normalize: How scores are made comparable between structures.
        uniform: True removes as much in every layer; False ranks units over all layers.
        align: Kept sizes are multiples of this, by role; one alone is of ``*``, which is all widths
            (heads, layers and experts have to be named). A number, or a name of
            `graphprune.passes.selection.alignment.ALIGNMENTS`.
        exclude: Structures that one of these selectors means stay whole.
        include: If given, only structures that one of these selectors means are pruned.
        minimum: Floor of units left in a structure, or the fraction of it.
        calibration: Data for what needs it, and text to measure the perplexity on.
        rounds: Number of select-and-apply rounds.
        seed: Of everything random.
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

    names: dict[SelectorText, OwnRole] = Field(default={})
    remove: Annotated[dict[Removable, Removed], Field(min_length=1)] | None = None
    target: Annotated[dict[BudgetName, Budget], Field(min_length=1, max_length=1)] | None = None
    shape: Annotated[dict[RoleName, Units], Field(min_length=1)] | None = None
    plan: Annotated[str, Field(min_length=1)] | None = None
    sparsify: Annotated[Sparsify, bare("method")] | None = None
    score: Annotated[Score, bare("name")] = Score(name=AUTO)
    aggregate: Literal["sum", "mean", "max", "prod", "last"] = "sum"
    normalize: Literal["mean", "max", "sum", "none"] = "mean"
    uniform: bool = True
    align: Annotated[dict[RoleOrAll, Aligned], BeforeValidator(_for_all_roles)] = Field(
        default={"*": 1}
    )
    exclude: Selectors = ()
    include: Selectors = ()
    minimum: Annotated[int | float, BeforeValidator(_minimum)] = 1
    calibration: Calibration = Calibration()
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    formats: Annotated[tuple[FormatName, ...], BeforeValidator(listed), Field(min_length=1)] = (
        "hf",
    )
    verify: Verification = Verification()
    native: Literal["require", "prefer"] = "prefer"
    repair: Annotated[Repairing, bare("name")] = Repairing(name=AUTO)
    fail_if: Annotated[tuple[ConditionText, ...], BeforeValidator(listed)] = ()

    @model_validator(mode="after")
    def _exactly_one_goal(self) -> Self:
        given = [goal for goal in GOALS if getattr(self, goal) is not None]
        if len(given) > 1 or not (given or self.sparsify):
            found = f"this one has {' and '.join(given)}" if given else "this one has none"
            wanted = "at most" if self.sparsify else "exactly"
            also = "" if given or self.sparsify else ", or sparsify"
            raise ValueError(f"a recipe has {wanted} one of {', '.join(GOALS)}{also}; {found}")
        if any({"heads", "kv_heads"} <= (one or {}).keys()
               for one in (self.remove, self.shape, self.align)):  # fmt: skip
            raise ValueError("'heads' and 'kv_heads' name the same role; give one of them")
        fields = type(self).model_fields
        entries = {name: getattr(self, name) for name in self.model_fields_set}
        changed = {n: value for n, value in entries.items() if value != fields[n].default}
        check_together(changed, removes=self.removes, score=self.score.name)
        return self

    @property
    def removes(self) -> bool:
        """Whether structures are removed."""
        return any(getattr(self, goal) is not None for goal in GOALS)

    @property
    def score_needs_data(self) -> bool:
        """Whether the score says that it wants calibration data; `auto` is none as yet.

        Raises:
            PlanError: the score doesn't take its options, or can't be loaded.
        """
        if not self.removes or self.plan is not None or self.score.name == AUTO:
            return False
        return self.score.needs_data

    @property
    def repairs(self) -> bool:
        """Whether weights are changed to make up for structures that go."""
        return self.removes and self.repair.name not in UNREPAIRED

    @property
    def repairs_on_data(self) -> bool:
        """Whether a repair looks at calibration data."""
        return self.repairs and self.repair.needs_data

    @property
    def operates(self) -> bool:
        """Whether units are chosen while weights are refitted."""
        return self.removes and self.plan is None and self.score.name == "obs"

    @property
    def needs_data(self) -> bool:
        """Whether the score, the repair or the masks may want calibration data."""
        masks = self.sparsify is not None and self.sparsify.needs_data
        return self.score_needs_data or self.repairs_on_data or masks

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
            return cls.model_validate(dict(data))
        except ValidationError as error:
            found = error.errors()
        mistakes = [_explain(cast("Mapping[str, Any]", item)) for item in found[:_TOLD]]
        if len(found) > _TOLD:
            mistakes.append(f"and {len(found) - _TOLD} more")
        raise RecipeError(
            "the recipe is not valid" if len(mistakes) > 1 else mistakes[0],
            where=where,
            why="; ".join(mistakes) if len(mistakes) > 1 else None,
        )

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a YAML file.

        Raises:
            RecipeError: The file is missing, is not YAML, or is not a valid recipe.
        """
        return cls.parse(read_yaml(path), where=str(path))

    @classmethod
    def from_flags(cls, path: str | Path | None, flags: Mapping[str, object]) -> Recipe:
        """Joins a YAML file, if there is one, with command-line flags; a flag wins.

        Args:
            path: Of the file.
            flags: Recipe keys, ``text`` and ``data`` for those of the calibration, and
                ``sparsify``, a mapping of that section's keys; None and empty values count as not
                given. ``remove``, ``target`` and ``shape`` are lists of words such as ``ffn=0.25``,
                and a goal replaces the goal of the file. ``include`` and ``exclude`` belong to
                ``sparsify`` where no structures are removed.

        Raises:
            RecipeError: A word is not ``key=number``, or the result is not a valid recipe.
        """
        given = {key: value for key, value in flags.items() if value not in (None, [], ())}
        if isinstance(given.get("align"), list | tuple):
            given["align"] = alignment_words(cast("Iterable[str]", given["align"]))
        for goal in ("remove", "target", "shape"):
            if goal in given:
                given[goal] = _pairs(goal, cast("Iterable[str]", given[goal]))
        base: object = {} if path is None else read_yaml(path)
        where = "the command line" if path is None else str(path)
        if not isinstance(base, Mapping):
            return cls.parse(base, where)
        if any(goal in given for goal in GOALS):
            base = {key: value for key, value in base.items() if key not in GOALS}
        masks = {k: v for k, v in cast("Mapping[str, object]", given.pop("sparsify", {})).items()
                 if v is not None}  # fmt: skip
        if masks or "sparsify" in base:
            if not any(goal in given or goal in base for goal in GOALS):
                masks |= {k: given.pop(k) for k in ("include", "exclude") if k in given}
            given["sparsify"] = _joined(base.get("sparsify"), masks)
        sources = {key: given.pop(key) for key in ("text", "data") if key in given}
        if sources:
            section = base.get("calibration")
            own = section if isinstance(section, Mapping) else {}
            given["calibration"] = {**own, **sources}
        return cls.parse({**base, **given}, where)

    def to_yaml(self) -> str:
        """Renders what differs from the defaults; :meth:`load` reads it back."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False)


def _joined(section: object, flags: Mapping[str, object]) -> object:
    """A section ``sparsify`` with flags in place of its entries.

    The options of one method mean nothing to another, and a pattern takes the place of a sparsity.
    """
    if not flags:
        return section
    own = dict(section) if isinstance(section, Mapping) else {}
    if isinstance(section, str):
        own = {"method": section}
    if flags.get("method", own.get("method")) != own.get("method"):
        own = {key: value for key, value in own.items() if key in Sparsify.model_fields}
    if "sparsity" in flags or "pattern" in flags:
        own = {key: value for key, value in own.items() if key not in ("sparsity", "pattern")}
    joined = {**own, **flags}
    if "method" not in joined:
        raise RecipeError(
            "no method is given for the weights that are to become zero",
            where=f"--{next(iter(flags))}",
            hint="add --sparsify sparsegpt, or another method",
        )
    return joined


def _pairs(goal: str, words: Iterable[str]) -> dict[str, str]:
    """Reads ``ffn=0.25 heads=1/3`` or ``ffn=0.25,heads=1/3``."""
    pairs: dict[str, str] = {}
    for word in (part.strip() for text in words for part in text.split(",")):
        key, equals, number = word.partition("=")
        if not (key and equals and number):
            raise RecipeError(
                f"'{word}' is not of the form name=number",
                where=f"--{goal}",
                hint=f"write --{goal} {'params' if goal == 'target' else 'ffn'}=0.5",
            )
        if key in pairs:
            raise RecipeError(f"'{key}' is given twice", where=f"--{goal}")
        pairs[key] = number
    return pairs


def _explain(error: Mapping[str, Any]) -> str:
    """Turns one pydantic error into a sentence that names the key and the nearest valid word."""
    # A bad key of a mapping is located at ('remove', 'fnn', '[key]'), and a value of several forms
    # at that which it was taken for.
    place = [str(part)[:80] for part in error["loc"] if part not in ("[key]", *FORMS)]
    path = ".".join(place)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        section = ".".join(place[:2] if place[:2] == ["calibration", "data"] else place[:-1])
        fields = _SECTIONS[section].model_fields
        return f"unknown key '{path}'; {nearest(place[-1], fields)}"
    if error["type"] == "literal_error":
        message = f"'{error['input']}' is not {error['ctx']['expected']}"
    message = message if len(message) <= 400 else f"{message[:400]}..."
    return f"in '{path}': {message}" if place else message


_SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "calibration": Calibration,
    "calibration.data": Part,
    "verify": Verification,
}
