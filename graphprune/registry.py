"""Passes by name, our own and those that other packages add by entry point.

A registry knows names without importing what they stand for, so that a recipe is checked before
torch is imported. Options are the fields of a pass's dataclass, of their types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from graphprune.errors import PlanError, RecipeError
from graphprune.options import nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The passes of one kind.

    Attributes:
        kind: what they are called in messages, "mask method".
        group: of entry points, whose names are those of the passes and whose values their classes.
        own: the name of each of ours to its class, as in an entry point: ``module:Class``.
        blind: those of ours that need no data.
        assumed: whether a pass that doesn't say so needs data.
    """

    kind: str
    group: str
    own: Mapping[str, str]
    blind: frozenset[str] = frozenset()
    assumed: bool = True

    def names(self) -> tuple[str, ...]:
        """All names, in order.

        Raises:
            PlanError: two packages define one.
        """
        return tuple(sorted({*self.own, *self._plugins()}))

    def known(self, name: str) -> str:
        """A name, if it is one.

        Raises:
            ValueError: there is no such pass.
        """
        if name not in self.own and name not in self._plugins():
            raise ValueError(f"unknown {self.kind} '{name}'; {nearest(name, self.names())}")
        return name

    def find(self, name: str) -> type[T]:
        """The class of a pass.

        Raises:
            ValueError: there is no such pass.
            PlanError: it can't be loaded, or two packages define it.
        """
        points = self._plugins()
        if name in self.own:
            point = EntryPoint(name, self.own[name], self.group)
        else:
            point = points[self.known(name)]
        try:
            found: type[T] = point.load()
        except Exception as error:  # whatever importing somebody's package raises
            raise PlanError(
                f"{self.kind} {name!r} can't be loaded",
                where=f"entry point {point.value} of {self.group}",
                why=f"{type(error).__name__}: {error}",
                hint="mend or remove the package that registers it",
            ) from error
        return found

    def options(self, name: str) -> tuple[str, ...]:
        """The names of a pass's options.

        Raises:
            ValueError, PlanError: see `find`.
        """
        return _options(self.find(name))

    def build(
        self, name: str, options: Mapping[str, Any], ready: Mapping[str, Any] | None = None
    ) -> T:
        """A pass with options.

        Args:
            name: of the pass.
            options: values of its fields.
            ready: further ones, which are of their types.

        Raises:
            ValueError: there is no such pass or option, a value is of another type, or the pass
                refuses it.
            PlanError: see `find`.
        """
        made = self.find(name)
        what = f"{self.kind} '{name}'"
        values = dict(options)
        if is_dataclass(made):
            hints, valid = get_type_hints(made, include_extras=True), _options(made)
            for option, value in options.items():
                if not valid:
                    raise ValueError(f"{what} has no options")
                if option not in valid:
                    raise ValueError(f"{what} has no option '{option}'; {nearest(option, valid)}")
                values[option] = _value(hints[option], f"option '{option}' of {what}", value)
        try:
            return made(**values, **(ready or {}))
        except (PlanError, RecipeError) as error:
            raise ValueError(f"{what}: {error.what}") from error
        except TypeError as error:
            raise ValueError(f"{what} doesn't take these options: {error}") from error

    def needs_data(self, name: str) -> bool:
        """Whether a pass looks at calibration data; only those of others are loaded to tell.

        Raises:
            ValueError, PlanError: see `find`.
        """
        if name in self.own:
            return name not in self.blind
        return bool(getattr(self.find(name), "needs_data", self.assumed))

    def _plugins(self) -> Mapping[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self.own or point.name in found:
                raise PlanError(
                    f"two {self.kind}s are named {point.name!r}",
                    where=f"entry point {point.value}",
                    hint="uninstall one of the packages that define it, or rename it in "
                    f"{self.group}",
                )
            found[point.name] = point
        return found


def _options(made: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(made)) if is_dataclass(made) else ()


def _value(hint: Any, what: str, value: Any) -> Any:
    """An option's value, checked against the type of its field."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ValueError(f"{what}: {message[:1].lower()}{message[1:]}, not {value!r}") from None
