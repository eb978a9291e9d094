"""The recipe: what to remove, how to choose it, and what to write, as one validated piece of data.

A recipe is YAML, a mapping, or a handful of command-line flags; all three end as a frozen
:class:`Recipe`. Everything that can be wrong without looking at a model is caught here, and an
unknown key, role or score is an error that names the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from graphprune.errors import RecipeError
from graphprune.selector import Selector

ROLES = (
    "ffn",
    "hidden",
    "heads",
    "kv_heads",
    "query_heads",
    "qk_dim",
    "v_dim",
    "channels",
    "latent",
    "expert_groups",
    "experts",
    "layers",
)
"""The roles that a recipe may name beside its own; ``heads`` is another word for ``kv_heads``."""

SCORES: Mapping[str, tuple[str, ...]] = {
    "auto": (),
    "magnitude": ("norm",),
    "random": ("seed",),
    "taylor": ("batch",),
}
"""Our own scores and their options, known here without importing torch; `auto` chooses one."""

FORMATS = ("hf", "onnx", "onnx-decoder", "pt2")
BUDGETS = ("params", "macs", "bytes")
GOALS = ("remove", "target", "shape", "plan")

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def nearest(word: str, valid: Iterable[str]) -> str:
    """Says which valid word was probably meant: ``did you mean 'ffn'?``, or lists them all."""
    valid = tuple(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"the valid ones are {', '.join(valid)}"


def parse_number(value: object) -> int | float:
    """Reads ``0.25``, ``"1/3"``, ``"25%"``, ``64`` or ``"100M"``.

    Raises:
        ValueError: The value is none of these.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    if isinstance(value, int | float):
        return value
    text = value.strip()
    try:
        if text.endswith("%"):
            return float(Fraction(text[:-1]) / 100)
        if "/" in text:
            return float(Fraction(text.replace(" ", "")))
        if match := re.fullmatch(r"([0-9_.]+)\s*([KMGBT]?)", text, re.IGNORECASE):
            number = Fraction(match[1]) * _SUFFIXES[match[2].upper()]
            whole = number.denominator == 1 and "." not in text.rstrip("KMGBTkmgbt")
            return int(number) if whole or match[2] else float(number)
        return float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is not a number; write 0.25, 1/3, 25%, 64 or 100M") from None


def _removed_fraction(value: object) -> float:
    number = float(parse_number(value))
    if not 0 <= number < 1:
        raise ValueError(f"{value!r} is not a fraction to remove: 0 <= fraction < 1")
    return number


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
    if number < 1 or number != int(number):
        raise ValueError(f"{value!r} is neither a number of units (>= 1) nor a fraction below 1")
    return int(number)


def _one_of(kind: str, valid: tuple[str, ...]) -> AfterValidator:
    def check(word: str) -> str:
        if word not in valid:
            raise ValueError(f"unknown {kind} '{word}'; {nearest(word, valid)}")
        return word

    return AfterValidator(check)


def _score_name(word: str) -> str:
    valid = (*SCORES, *(point.name for point in entry_points(group="graphprune.passes")))
    if word not in valid:
        raise ValueError(f"unknown score '{word}'; {nearest(word, valid)}")
    return word


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


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
SelectorText = Annotated[str, AfterValidator(_selector)]
BudgetName = Annotated[str, _one_of("budget", BUDGETS)]
FormatName = Annotated[str, _one_of("format", FORMATS)]
Removed = Annotated[float, BeforeValidator(_removed_fraction)]
Budget = Annotated[int | float, BeforeValidator(_budget)]
Units = Annotated[int, BeforeValidator(parse_number), Field(ge=1)]
Selectors = Annotated[tuple[SelectorText, ...], BeforeValidator(_listed)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Score(_Data):
    """How a unit's importance is computed.

    Attributes:
        name: ``magnitude``, ``taylor`` (first order, needs calibration text), ``random``, the
            score of another package, or ``auto``: taylor for a language model with a tokenizer,
            which magnitude alone would ruin, and magnitude for everything else. Its options are
            further keys: ``norm: l1`` for magnitude.
    """

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, AfterValidator(_score_name)]

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        valid = SCORES.get(self.name)
        for option in self.model_extra or ():
            if valid is not None and option not in valid:
                raise ValueError(
                    f"score '{self.name}' has no option '{option}'; {nearest(option, valid)}"
                )
        return self


class Calibration(_Data):
    """Where calibration text comes from: ``windows`` windows of ``length`` tokens.

    Attributes:
        text: ``builtin`` (CPython's English reference text) or the path of a text or JSONL file.
    """

    text: str = "builtin"
    windows: Units = 16
    length: Annotated[int, Field(ge=2)] = 128


class Verification(_Data):
    """How the slim model is compared with the masked one.

    Attributes:
        dtype: ``auto`` is float64 where that fits.
        tolerance: Difference accepted, in parts of max(1, largest value of the output); None for
            1e-9 in float64 and 1e-4 in float32.
    """

    dtype: Literal["auto", "float32", "float64"] = "auto"
    tolerance: Annotated[float, Field(gt=0)] | None = None


class Recipe(_Data):
    """What to remove and what to write. One of remove, target, shape and plan is given.

    Attributes:
        names: Selector to a role of one's own for the structures that it means.
        remove: Fraction of the units of a role to remove; ``*`` is every prunable role. A selector
            (see `graphprune.selector`) instead of a role sets it for what it means.
        target: Budget for the slim model: a fraction of the dense one (at most 1), or absolute.
        shape: Exact sizes of the slim model by role.
        plan: Path of a saved plan to replay.
        score: How units are ranked; a bare name stands for ``{name: ...}``.
        aggregate: How the scores of the members of one unit are joined.
        normalize: How scores are made comparable between structures.
        uniform: True removes as much in every layer; False ranks units over all layers.
        align: Kept sizes are multiples of this, by role; a number alone is ``{"*": number}``.
        exclude: Structures that one of these selectors means stay whole.
        include: If given, only structures that one of these selectors means are pruned.
        minimum: Floor of units left in a structure, or the fraction of it.
        calibration: Text for scores that need data.
        rounds: Number of select-and-apply rounds.
        seed: Of everything random.
        formats: What to write: ``hf``, ``onnx``, ``onnx-decoder`` (with key-value cache), ``pt2``.
        verify: How the result is checked.
        native: What to do if no native Hugging Face config can hold the plan: ``require`` refuses,
            ``prefer`` writes a self-contained form with a warning.
    """

    names: dict[SelectorText, OwnRole] = {}
    remove: Annotated[dict[Removable, Removed], Field(min_length=1)] | None = None
    target: Annotated[dict[BudgetName, Budget], Field(min_length=1, max_length=1)] | None = None
    shape: Annotated[dict[RoleName, Units], Field(min_length=1)] | None = None
    plan: Annotated[str, Field(min_length=1)] | None = None
    score: Annotated[Score, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = (
        Score(name="auto")
    )
    aggregate: Literal["sum", "mean", "max", "prod"] = "sum"
    normalize: Literal["mean", "max", "sum", "none"] = "mean"
    uniform: bool = True
    align: Annotated[dict[RoleOrAll, Units], BeforeValidator(_for_all_roles)] = {"*": 1}
    exclude: Selectors = ()
    include: Selectors = ()
    minimum: Annotated[int | float, BeforeValidator(_minimum)] = 1
    calibration: Calibration = Calibration()
    rounds: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    formats: Annotated[tuple[FormatName, ...], BeforeValidator(_listed), Field(min_length=1)] = (
        "hf",
    )
    verify: Verification = Verification()
    native: Literal["require", "prefer"] = "prefer"

    @model_validator(mode="after")
    def _exactly_one_goal(self) -> Self:
        given = [goal for goal in GOALS if getattr(self, goal) is not None]
        if len(given) != 1:
            found = f"this one has {' and '.join(given)}" if given else "this one has none"
            raise ValueError(f"a recipe has exactly one of {', '.join(GOALS)}; {found}")
        if any({"heads", "kv_heads"} <= (goal or {}).keys() for goal in (self.remove, self.shape)):
            raise ValueError("'heads' and 'kv_heads' name the same role; give one of them")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether the score may want calibration text; of a score of others nobody knows."""
        return self.plan is None and self.score.name not in ("auto", "magnitude", "random")

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
            mistakes = [_explain(cast("Mapping[str, Any]", item)) for item in error.errors()]
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
            flags: Recipe keys, and ``text`` for the text of the calibration; None and empty values
                count as not given. ``remove``, ``target`` and ``shape`` are lists of words such as
                ``ffn=0.25``, and a goal replaces the goal of the file.

        Raises:
            RecipeError: A word is not ``key=number``, or the result is not a valid recipe.
        """
        given = {key: value for key, value in flags.items() if value not in (None, [], ())}
        for goal in ("remove", "target", "shape"):
            if goal in given:
                given[goal] = _pairs(goal, cast("Iterable[str]", given[goal]))
        base: object = {} if path is None else read_yaml(path)
        where = "the command line" if path is None else str(path)
        if not isinstance(base, Mapping):
            return cls.parse(base, where)
        if any(goal in given for goal in GOALS):
            base = {key: value for key, value in base.items() if key not in GOALS}
        if "text" in given:
            section = base.get("calibration")
            given["calibration"] = {
                **(section if isinstance(section, Mapping) else {}),
                "text": given.pop("text"),
            }
        return cls.parse({**base, **given}, where)

    def to_yaml(self) -> str:
        """Renders what differs from the defaults; :meth:`load` reads it back."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False)


def read_yaml(path: str | Path) -> object:
    """Reads one YAML document as plain data.

    Raises:
        RecipeError: The file is missing, unreadable or not YAML, or a key is given twice.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise RecipeError("the recipe does not exist", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("the recipe can't be read", where=str(path), why=str(error)) from None
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise RecipeError("the recipe is not valid YAML", where=str(path), why=why) from None


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; a recipe with both is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping and refuses a repeated key."""
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "a key is given twice", node.start_mark
            )
        return mapping


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
    # A bad key of a mapping is located at ('remove', 'fnn', '[key]').
    place = [str(part) for part in error["loc"] if part != "[key]"]
    path = ".".join(place)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = _SECTIONS[".".join(place[:-1])].model_fields
        return f"unknown key '{path}'; {nearest(place[-1], fields)}"
    if error["type"] == "literal_error":
        message = f"'{error['input']}' is not {error['ctx']['expected']}"
    return f"in '{path}': {message}" if place else message


_SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "calibration": Calibration,
    "verify": Verification,
}
