"""One registration per operator, of a torch graph or an ONNX graph: every rule that it has.

Operators are known by a name with a namespace or domain, "aten.view", "onnx.Reshape",
"com.microsoft.Attention", "mylib.scaled_add"; "mylib::scaled_add" is the same name. Our own rules
lie beside what calls them, by kind, and come together here; other packages register an operator
with all of its rules at once, by entry point or by `register_op`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from graphprune.errors import GraphPruneError
from graphprune.ops.context import Rule

ENTRY_POINT = "graphprune.ops"

SizeRule: TypeAlias = Callable[[Any], None]
Formula: TypeAlias = Callable[[Any], Any]
Shape: TypeAlias = "tuple[int, ...]"
ShapeRule: TypeAlias = "Callable[[Sequence[Shape], Mapping[str, Any]], list[Shape | None]]"
R = TypeVar("R", bound=Callable[..., Any])

_HINT = "remove one of the packages that register it, or rename the operator"


@dataclass(frozen=True)
class OpDef:
    """What graphprune knows about an operator.

    Attributes:
        axes: its axis rule, without which the axes that it touches are frozen.
        sizes: recomputes the sizes that a call carries, for an operator that takes some. It is
            given `graphprune.rewrite.sizes.Call`, or that of `graphprune.rewrite.onnx_rewriter`.
        masked: computes it with removed coordinates left out, for an operator that notices zeros.
            It is given `graphprune.oracle.masked_ops.Call` and returns the result, or changes the
            graph by `graphprune.oracle.onnx_masking.Call`.
        shapes: the shapes of an ONNX operator's results, from those of its inputs ``()`` where
            one isn't there, and its attributes; ONNX itself knows those of its own domain. The
            results have the element type of the first input.
        library: a shared library that ONNX Runtime loads the kernel of an ONNX operator from.
    """

    axes: Rule | None = None
    sizes: SizeRule | None = None
    masked: Formula | None = None
    shapes: ShapeRule | None = None
    library: str | Path | None = None

    def __str__(self) -> str:
        """Where its rules are from: the name of the first one."""
        rules = (getattr(self, f.name) for f in fields(self))
        first = next((r for r in rules if r is not None), None)
        return _name_of(first) if callable(first) else str(first)


UNKNOWN = OpDef()


class Operators:
    """Definitions by operator name."""

    def __init__(self, known: Mapping[str, OpDef] | None = None) -> None:
        """A registry that knows some operators, and those of installed packages."""
        self._known = dict(known or {})
        self._installed: dict[str, OpDef] | None = None  # looked up on first use

    def add(self, operator: Any, definition: OpDef) -> None:
        """Register an operator.

        Args:
            operator: its name, "mylib::scaled_add", or the torch operator itself; overloads
                share one definition.
            definition: all of its rules.

        Raises:
            GraphPruneError: it is registered already, or the name lacks a namespace.
        """
        name = operator_name(operator)
        known = self._known.get(name) or (self._installed or {}).get(name)
        if known is not None:
            raise _twice(name, str(known), str(definition))
        self._known[name] = definition

    def add_rule(self, name: str, kind: str, rule: Callable[..., Any]) -> None:
        """Add one rule to an operator of our own.

        Raises:
            GraphPruneError: it has a rule of that kind.
        """
        known = self._known.get(name, UNKNOWN)
        first = getattr(known, kind) or (self._installed or {}).get(name)
        if first is not None:
            given = str(first) if isinstance(first, OpDef) else _name_of(first)
            raise _twice(name, given, _name_of(rule))
        added: dict[str, Any] = {kind: rule}
        self._known[name] = replace(known, **added)

    def find(self, name: str) -> OpDef:
        """What is known about an operator: nothing but None if it isn't registered.

        Raises:
            GraphPruneError: what an installed package registers can't be loaded, or is registered
                already.
        """
        return self._known.get(name) or self._others().get(name, UNKNOWN)

    def libraries(self) -> tuple[str, ...]:
        """The shared libraries of all operators, once each.

        Raises:
            GraphPruneError: see `find`.
        """
        every = (*self._known.values(), *self._others().values())
        return tuple(dict.fromkeys(str(d.library) for d in every if d.library is not None))

    def copy(self) -> Operators:
        """A registry that is apart from this one, and looks for installed packages anew."""
        return Operators(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._known, *self._others()}))

    def _others(self) -> Mapping[str, OpDef]:
        """What installed packages register by entry point."""
        if self._installed is not None:
            return self._installed
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=ENTRY_POINT):
            name = operator_name(point.name)
            if name in points:
                raise _twice(name, _where(points[name]), _where(point))
            if name in self._known:
                raise _twice(name, str(self._known[name]), _where(point))
            points[name] = point
        found = {name: _definition(point) for name, point in points.items()}
        for name in found.keys() & self._known.keys():  # by a package while it was loaded
            raise _twice(name, str(self._known[name]), _where(points[name]))
        self._installed = found
        return found


OPERATORS = Operators()


def register_op(operator: Any, definition: OpDef) -> None:
    """Tell graphprune about an operator, in this process; see `Operators.add`.

    A package does so for all processes by an entry point of the group ``graphprune.ops``.
    """
    OPERATORS.add(operator, definition)


def find_op(name: str) -> OpDef:
    """What is known about an operator; see `Operators.find`."""
    return OPERATORS.find(name)


def find_libraries() -> tuple[str, ...]:
    """The shared libraries that ONNX Runtime loads kernels from; see `Operators.libraries`."""
    return OPERATORS.libraries()


@dataclass(frozen=True)
class RuleTable(Generic[R]):
    """Our own rules of one kind.

    Attributes:
        kind: the attribute of `OpDef`.
        prefix: the namespace of operators that are named without one, "aten.".
    """

    kind: str
    prefix: str

    def add(self, name: str, rule: R) -> None:
        """Register a rule for an operator.

        Raises:
            GraphPruneError: it has one.
        """
        OPERATORS.add_rule(name if "." in name else self.prefix + name, self.kind, rule)

    def rule(self, *names: str) -> Callable[[R], R]:
        """Decorator: register a function for some operators."""

        def register(rule: R) -> R:
            for name in names:
                self.add(name, rule)
            return rule

        return register


ATEN = RuleTable[Rule]("axes", "aten.")
ONNX = RuleTable[Rule]("axes", "onnx.")


def operator_name(operator: Any) -> str:
    """The name that an operator is registered by: "mylib.scaled_add".

    Args:
        operator: "mylib::scaled_add", or an operator, an overload of one or a custom operator of
            torch.

    Raises:
        GraphPruneError: there is no namespace in it.
    """
    name = operator
    if not isinstance(operator, str):
        schema = getattr(operator, "_schema", None)
        names = (getattr(operator, key, None) for key in ("_qualified_op_name", "_qualname"))
        name = next((n for n in (getattr(schema, "name", None), *names) if n), repr(operator))
    name = str(name).replace("::", ".")
    space, _, last = name.rpartition(".")
    if not space or not last or not last.isidentifier():
        raise GraphPruneError(
            f"{operator!r} is no operator that can be registered",
            why="its name has no namespace" if isinstance(operator, str) else None,
            hint='name it as "namespace::operator", or give the operator of torch',
        )
    return name


def _name_of(rule: Callable[..., Any]) -> str:
    return f"{rule.__module__}.{getattr(rule, '__qualname__', type(rule).__qualname__)}"


def _definition(point: EntryPoint) -> OpDef:
    try:
        found = point.load()
    except Exception as error:  # whatever importing somebody's package raises
        raise GraphPruneError(
            f"what is registered for operator {point.name} can't be loaded",
            where=_where(point),
            why=f"{type(error).__name__}: {error}",
            hint="mend or remove the package that registers it",
        ) from error
    if not isinstance(found, OpDef):
        raise GraphPruneError(
            f"what is registered for operator {point.name} is no definition",
            where=_where(point),
            why=f"it is {found!r}",
            hint="register an OpDef with its rules: OpDef(axes=...)",
        )
    return found


def _where(point: EntryPoint) -> str:
    return f"entry point {point.value!r} of {ENTRY_POINT}"


def _twice(name: str, first: str, second: str) -> GraphPruneError:
    return GraphPruneError(
        f"operator {name} is registered twice",
        why=f"{first} and {second} both claim it",
        hint=_HINT,
    )
