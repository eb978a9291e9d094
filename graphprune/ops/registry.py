"""Tables from operator names to rules. A duplicate name is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points

from graphprune.errors import GraphPruneError
from graphprune.ops.context import Rule

ENTRY_POINT = "graphprune.ops"


class RuleTable:
    """Rules of one graph format, by operator name."""

    def __init__(self, prefix: str) -> None:
        """An empty table for names that begin with `prefix` ("aten.")."""
        self.prefix = prefix
        self._rules: dict[str, Rule] = {}
        self._plugins_loaded = False

    def add(self, name: str, rule: Rule) -> None:
        """Register `rule` for `name`.

        Raises:
            GraphPruneError: the name has a rule already.
        """
        if name in self._rules:
            raise GraphPruneError(
                f"operator {name} has two rules",
                why=f"{self._rules[name].__qualname__} and {rule.__qualname__} both claim it",
                hint="remove one of the packages that register it, or rename the operator",
            )
        self._rules[name] = rule

    def rule(self, *names: str) -> Callable[[Rule], Rule]:
        """Decorator: register a function for names under the table's prefix."""

        def register(rule: Rule) -> Rule:
            for name in names:
                self.add(self.prefix + name, rule)
            return rule

        return register

    def find(self, name: str) -> Rule | None:
        """The rule for `name`, or None; rules of installed plug-ins are loaded on first use."""
        if not self._plugins_loaded:
            loaded = [(point.name, _load(point)) for point in entry_points(group=ENTRY_POINT)]
            for plugin, rule in loaded:
                self.add(plugin, rule)
            self._plugins_loaded = True
        return self._rules.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._rules))


def _load(point: EntryPoint) -> Rule:
    try:
        rule: Rule = point.load()
    except Exception as error:  # whatever importing somebody's package raises
        raise GraphPruneError(
            f"the rule for operator {point.name} can't be loaded",
            where=f"entry point {point.value!r} of {ENTRY_POINT}",
            why=f"{type(error).__name__}: {error}",
            hint="mend or remove the package that registers it",
        ) from error
    return rule


ATEN = RuleTable("aten.")
ONNX = RuleTable("onnx.")
