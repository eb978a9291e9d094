"""What an operator rule works with: an operator, its operands' axes and the state of inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from graphprune.axes import UNIT, Atom, Dims, Expr, Reason, atoms, freeze, product, unify
from graphprune.axes.expr import IntArray
from graphprune.ops.index_types import Points


class Size(NamedTuple):
    """One dimension of a result.

    Attributes:
        size: in the example.
        dynamic: whether callers may change it.
        factor: what a dynamic size is always a multiple of, such as 4 of a batch times 4 heads.
    """

    size: int
    dynamic: bool = False
    factor: int = 1


Sizes: TypeAlias = tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor argument.

    Attributes:
        dims: one axis expression per dimension.
        points: the axis that its values point into, where they are places along one.
        value: its values, where it is a constant list of places.
    """

    dims: Dims
    points: Points | None = None
    value: IntArray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the example."""
        return tuple(d.size for d in self.dims)


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator as its rule sees it, whatever graph format it came from.

    Attributes:
        name: its name in that format, "aten.view".
        arguments: by schema name; tensors are `Operand`, dynamic integers have their size in the
            example.
        results: the sizes of its tensor results, None for a result that is no tensor.
        dynamic: names of the integer arguments that callers may change.
    """

    name: str
    arguments: Mapping[str, Any]
    results: tuple[Sizes | None, ...]
    dynamic: frozenset[str] = frozenset()

    def __getitem__(self, key: str) -> Any:
        return self.arguments[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The argument `key`, or `default` where the schema has no such argument."""
        return self.arguments.get(key, default)

    @property
    def operands(self) -> list[Operand]:
        """All tensor arguments, those inside lists included, in order."""
        found: list[Operand] = []
        for value in self.arguments.values():
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Operand):
                    found.append(item)
        return found

    @property
    def out(self) -> Sizes:
        """The sizes of the first result.

        Raises:
            RuleError: the first result is no tensor.
        """
        if not self.results or self.results[0] is None:
            raise RuleError(f"{self.name} has no tensor result")
        return self.results[0]


class RuleError(Exception):
    """A rule can't type this use of its operator; the caller freezes all axes involved."""


Rule: TypeAlias = "Callable[[Context, Operator], Dims | list[Dims]]"


class Minimum(NamedTuple):
    """How many indices of an axis an operator needs.

    Attributes:
        axis: the axis.
        least: that many, whatever else is pruned (k of a top-k).
        above: an axis that has to stay the smaller one, of which `least` is the size and one more.
    """

    axis: Expr
    least: int
    above: Expr | None = None


@dataclass
class Typing:
    """The result of axis inference.

    Attributes:
        values: graph value name to the axes of its tensors (several for a multi-result operator).
        parameters: parameter, buffer and constant name to its axes.
        contractions: value name to the axes that its multiply-accumulates range over.
        hints: axes that an operator recognised, with a role's name.
        opaque: value name to the reason for operators that no rule could type.
        points: value name to what the values of its tensors point into, None where they don't.
        stored: buffer or constant name to what its values point into.
        minima: how many indices of axes operators need.
        choices: value name to an axis and the constant places that an operator takes of it.
        constants: names of values made by operators from nothing but their places.
    """

    values: dict[str, tuple[Dims, ...]] = field(default_factory=dict)
    parameters: dict[str, Dims] = field(default_factory=dict)
    contractions: list[tuple[str, Dims]] = field(default_factory=list)
    hints: list[tuple[Expr, str]] = field(default_factory=list)
    opaque: dict[str, Reason] = field(default_factory=dict)
    points: dict[str, tuple[Points | None, ...]] = field(default_factory=dict)
    stored: dict[str, Points] = field(default_factory=dict)
    minima: list[Minimum] = field(default_factory=list)
    choices: dict[str, tuple[Expr, IntArray]] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)


@dataclass
class Context:
    """Inference at one operator: unifies and freezes on its behalf.

    Attributes:
        typing: collects the results.
        node: name of the graph value.
        line: the model's source line, or "".
        idle: whether the results are used for their shapes only, so that nothing is frozen.
        given: result number to what its values point into; set by the rule.
        taken: what the rule has understood of the operands' points. Those of other operands are
            taken for numbers.
    """

    typing: Typing
    node: str = ""
    line: str = ""
    idle: bool = False
    given: dict[int, Points] = field(default_factory=dict)
    taken: list[Points] = field(default_factory=list)

    def reason(self, why: str) -> Reason:
        """`why`, at this operator."""
        return Reason(why, self.node, self.line)

    def unify(self, a: Expr, b: Expr, why: str = "axes whose structures don't fit") -> None:
        """Make two axes one; `why` is recorded where that is possible only without pruning.

        Raises:
            RuleError: their sizes differ.
        """
        if a.size != b.size:
            raise RuleError(f"axes of size {a.size} and {b.size} meet")
        unify(a, b, self.reason(why))

    def freeze(self, e: Expr, why: str) -> None:
        """Forbid pruning `e`."""
        if self.idle:
            return
        freeze(e, self.reason(why))

    def fresh(self, size: Size | int, why_frozen: str | None = None) -> Expr:
        """A new axis; frozen if `why_frozen` is given or its size is dynamic."""
        size = Size(size) if isinstance(size, int) else size
        if size.size == 1 and not size.dynamic:
            return UNIT
        if size.dynamic and size.factor not in (1, size.size) and not why_frozen:
            dynamic = self.fresh(Size(size.size // size.factor, dynamic=True))
            return product((dynamic, Atom(size.factor, self.node)))
        atom = Atom(size.size, self.node)
        if size.dynamic:
            freeze(atom, self.reason("a dynamic dimension"))
        elif why_frozen:
            freeze(atom, self.reason(why_frozen))
        return atom

    def fresh_like(self, size: Size | int, *frozen: Expr) -> Expr:
        """A new axis that can't be pruned because `frozen` can't, for the same reason."""
        reasons = (a.reason for e in frozen for a in atoms(e) if a.reason is not None)
        e = self.fresh(size, "made of axes that can't be pruned")
        if isinstance(e, Atom):
            e.reason = next(reasons, e.reason)
        return e

    def macs(self, loop: Sequence[Expr]) -> None:
        """Record that the operator multiplies and adds once per point of `loop`."""
        if not self.idle:
            self.typing.contractions.append((self.node, tuple(loop)))

    def hint(self, e: Expr, role: str) -> None:
        """Record that the operator uses `e` as `role`."""
        if not self.idle:
            self.typing.hints.append((e, role))

    def look_up(self, e: Expr, index: Operand, why: str) -> None:
        """The values of `index` are places along `e`, frozen with `why` if they are foreign."""
        points = index.points
        if points is None:
            self.freeze(e, why)
            return
        self.taken.append(points)
        points.as_places(self.reason("its indices are used both as places and as numbers"))
        self.unify(e, points.axis)
        if not points.counted and not points.stored:
            self.hint(e, "experts")

    def carry(self, source: Operand, *results: int) -> None:
        """The values of `results` (or of the first result) are values of `source`."""
        if source.points is not None:
            self.taken.append(source.points)
            self.given.update(dict.fromkeys(results or (0,), source.points))

    def choose(self, e: Expr, result: int, least: int = 1) -> None:
        """The values of a result are places along `e`, which needs `least` of them."""
        self.given[result] = Points(e)
        if least > 1:
            self.typing.minima.append(Minimum(e, least))
