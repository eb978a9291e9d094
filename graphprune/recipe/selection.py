"""Which structures go and how they are chosen: the options of the pass ``select``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from graphprune.analysis.roles import ROLES as OWN_ROLES
from graphprune.options import Data, bare, listed, nearest, one_of, parse_number, removed_fraction
from graphprune.passes.selection.alignment import parse_alignment
from graphprune.plan.selector import HEADS, Selector
from graphprune.recipe.named import AUTO, Score
from graphprune.recipe.rules import changed, check_shape

_BEFORE = OWN_ROLES.index("kv_heads")
ROLES = (*OWN_ROLES[:_BEFORE], HEADS, *OWN_ROLES[_BEFORE:])
"""The roles that a recipe may name beside its own; for ``heads`` see `graphprune.plan.selector`."""

BUDGETS = ("params", "macs", "bytes")
WHAT = ("remove", "target", "shape")
"""The goals of a selection, of which it has one."""

NAMES = "names"
"""Where roles of one's own are, in a section and in the context that it is read in."""


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
    own = {**(info.context or {}).get(NAMES, {}), **info.data.get(NAMES, {})}
    valid = (*ROLES, *dict.fromkeys(own.values()))
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
BudgetName = Annotated[str, one_of("budget", BUDGETS)]
Removed = Annotated[float, BeforeValidator(removed_fraction)]
Budget = Annotated[int | float, BeforeValidator(_budget)]
Aligned = Annotated[int, BeforeValidator(parse_alignment)]
Units = Annotated[int, BeforeValidator(parse_number), Field(ge=1)]
Selectors = Annotated[tuple[SelectorText, ...], BeforeValidator(listed)]


class Goal(Data):
    """What to remove, and how units are chosen.

    Attributes:
        names: Selector to a role of one's own for the structures that it means.
        remove: Fraction of the units of a role to remove; ``*`` is every prunable role. A selector
            (see `graphprune.plan.selector`) instead of a role sets it for what it means.
        target: Budget for the slim model: a fraction of the dense one (at most 1), or absolute.
        shape: Exact sizes of the slim model by role.
        score: How units are ranked; a bare name stands for ``{name: ...}``.
        aggregate: How the scores of the members of one unit are joined.
        normalize: How scores are made comparable between structures.
        uniform: True removes as much in every layer; False ranks units over all layers.
        align: Kept sizes are multiples of this, by role; one alone is of ``*``, which is all widths
            (heads, layers and experts have to be named). A number, or a name of
            `graphprune.passes.selection.alignment.ALIGNMENTS`.
        exclude: Don't prune parameters matching these patterns (selectors).
        include: If given, prune only parameters matching these patterns.
        minimum: Floor of units left in a structure, or the fraction of it.
    """

    names: dict[SelectorText, OwnRole] = Field(default={})
    remove: Annotated[dict[Removable, Removed], Field(min_length=1)] | None = None
    target: Annotated[dict[BudgetName, Budget], Field(min_length=1, max_length=1)] | None = None
    shape: Annotated[dict[RoleName, Units], Field(min_length=1)] | None = None
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

    @model_validator(mode="after")
    def _names_heads_once(self) -> Self:
        if any({"heads", "kv_heads"} <= (one or {}).keys()
               for one in (self.remove, self.shape, self.align)):  # fmt: skip
            raise ValueError("'heads' and 'kv_heads' name the same role; give one of them")
        return self

    @property
    def goals(self) -> dict[str, Mapping[str, Any] | None]:
        """The three kinds of goal; all but one of a selection are None."""
        return {name: getattr(self, name) for name in WHAT}


class Selection(Goal):
    """The options of ``select``: one goal, and how it is reached."""

    @model_validator(mode="after")
    def _has_one_goal(self) -> Self:
        given = [name for name, goal in self.goals.items() if goal is not None]
        if len(given) != 1:
            found = f"this one has {' and '.join(given)}" if given else "this one has none"
            raise ValueError(f"select has exactly one of {', '.join(WHAT)}; {found}")
        check_shape(self.changed)
        return self

    @property
    def changed(self) -> dict[str, Any]:
        """The entries that aren't as by default."""
        return changed(self)

    @property
    def operates(self) -> bool:
        """Whether units are chosen while weights are refitted."""
        return self.score.name == "obs"
