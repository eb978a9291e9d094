"""Which structures a selection may touch, and down to what: roles, globs, floors, alignment."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.roles import ROLES
from graphprune.analysis.structure import Block, Structure
from graphprune.analysis.sublayers import SUBLAYERS
from graphprune.axes import Atom, Expr, atoms
from graphprune.axes.expr import IntArray
from graphprune.errors import PlanError
from graphprune.passes.selection.alignment import parse_alignment
from graphprune.plan.selector import HEADS, Bound, bind_all, own_name
from graphprune.plan.units import NONE, owners

ALL = "*"
COUNTED = frozenset(
    {"layers", "attention_blocks", "mlp_blocks", "experts", "expert_groups"}
)  # numbers of things, not sizes of a matrix
UNALIGNED = COUNTED | {"kv_heads", "query_heads"}  # unless they are named


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A structure that may lose units.

    Attributes:
        structure: the structure that may lose units.
        removable: the units that may go, ascending.
        ladder: kept counts that are allowed, descending from all units to the floor.
        meant: how many of its units a selector means, those that have to stay among them; None
            for all.
    """

    structure: Structure
    removable: IntArray
    ladder: IntArray
    meant: int | None = None

    @property
    def units(self) -> int:
        """How many units a fraction is of."""
        return self.structure.size if self.meant is None else self.meant


@dataclass(frozen=True)
class Scope:
    """What a selection may touch.

    Attributes:
        program: the program.
        exclude: selectors (see `graphprune.plan.selector`) of what stays whole; a layer that owns a
            parameter of one stays too.
        include: if there are any, only what one of these selectors means is pruned.
        minimum: units that stay in every structure, or the fraction of it (below 1).
        align: kept sizes are multiples of this, in positions of a dimension, by role or for all
            widths (heads, layers and experts have to be named); a number, or one of
            `graphprune.passes.selection.alignment.ALIGNMENTS`.
        whole: structures that stay whole because the score can't judge them, to the reason.
    """

    program: BaseProgram
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    minimum: int | float = 1
    align: int | str | Mapping[str, int | str] = 1
    whole: Mapping[str, str] = field(default_factory=dict)
    _known: dict[str, Candidate] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.minimum <= 0 or (self.minimum > 1 and self.minimum != int(self.minimum)):
            raise PlanError(
                f"minimum {self.minimum} is neither a number of units nor a fraction below 1"
            )
        for role in self._steps:
            if role not in (*ROLES, HEADS, ALL, *self.by_role):
                raise PlanError(f"unknown role {role!r}", where="align", hint=_listed(ROLES))

    def check_selectors(self) -> None:
        """See that all of `exclude` and `include` mean something.

        Raises:
            PlanError: one doesn't.
        """
        self._excluded, self._included  # noqa: B018  (bound at first use)

    def judging_all(self) -> Scope:
        """The same with a score that can judge every structure."""
        return replace(self, whole={})

    def role(self, name: str) -> str:
        """The model's own name for role `name`; see `graphprune.plan.selector.own_name`."""
        return own_name(name, self.by_role)

    @cached_property
    def by_role(self) -> dict[str, list[Structure]]:
        """All structures of each role."""
        found: dict[str, list[Structure]] = {}
        for structure in self.program.structures:
            found.setdefault(structure.role, []).append(structure)
        return found

    def prunable_roles(self) -> list[str]:
        """Roles with at least one structure that may lose a unit."""
        return [role for role in self.by_role if self._find(role)]

    def candidates(self, role: str) -> list[Candidate]:
        """The structures of a role that may lose units.

        Raises:
            PlanError: there are none; the message says why.
        """
        role = self.role(role)
        found = self._find(role)
        if not found:
            raise self._nothing(role)
        return found

    def meant(self, chosen: Bound) -> list[Candidate]:
        """The structures that a selector means and that may lose units; of a stack those layers.

        Raises:
            PlanError: there are none.
        """
        structures = list(self.program.structures)
        if chosen.selector.role in SUBLAYERS:
            structures += self.program.sublayers
        for s in structures:
            if s.blocks and s.prunable and chosen.touches(s):
                layers = [b.index for b in s.blocks if chosen.touches_block(b, s)]
                rest = np.intersect1d(self.candidate(s).removable, layers)
                ladder = self._ladder(s, len(rest))
                self._known[s.name] = Candidate(s, rest, ladder, len(layers))
        structures = [s for s in structures if chosen.touches(s)]
        open_ = [s for s in structures if s.prunable and s.size > 1]
        found = [c for s in open_ if len((c := self.candidate(s)).removable)]
        if not found:
            frozen = [s for s in structures if not s.prunable]
            if open_ and all(s.name in self.whole for s in open_):
                raise self._unjudged(f"nothing that {chosen.selector.text!r} means", open_)
            raise PlanError(
                f"{chosen.selector.text!r} means nothing that can be pruned",
                why=f"frozen: {_reasons(frozen)}" if frozen else None,
                hint="graphprune inspect --why PARAMETER says what a dimension belongs to",
            )
        return found

    def _find(self, role: str) -> list[Candidate]:
        structures = (s for s in self._of_role(role) if s.prunable and s.size > 1)
        return [c for s in structures if len((c := self.candidate(s)).removable)]

    def _of_role(self, role: str) -> list[Structure]:
        """All structures of a role, branches of layers included, which only their role means."""
        own = self.program.sublayers if role in SUBLAYERS else ()
        return [*self.by_role.get(role, ()), *(s for s in own if s.role == role)]

    def candidate(self, structure: Structure) -> Candidate:
        """What of a structure may go."""
        if structure.name not in self._known:
            self._known[structure.name] = self._examine(structure)
        return self._known[structure.name]

    def _examine(self, structure: Structure) -> Candidate:
        if structure.name in self.whole:
            units = []
        elif structure.blocks:
            units = sorted(b.index for b in structure.blocks if self._block_touchable(b, structure))
        else:
            units = list(range(structure.size)) if self._touchable(structure) else []
        removable = np.array(units, dtype=np.int64)
        return Candidate(structure, removable, self._ladder(structure, len(units)))

    def _touchable(self, structure: Structure) -> bool:
        if any(b.touches(structure) for b in self._excluded):
            return False
        return not self.include or any(b.touches(structure) for b in self._included)

    def _block_touchable(self, block: Block, structure: Structure) -> bool:
        if any(b.protects(block, structure) for b in self._excluded):
            return False
        return not self.include or any(b.touches_block(block, structure) for b in self._included)

    @cached_property
    def _excluded(self) -> tuple[Bound, ...]:
        return bind_all(self.exclude, self.program, "exclude")

    @cached_property
    def _included(self) -> tuple[Bound, ...]:
        return bind_all(self.include, self.program, "include")

    def _ladder(self, structure: Structure, removable: int) -> IntArray:
        size = structure.size
        least = self.minimum if self.minimum >= 1 else math.ceil(self.minimum * size)
        floor = max(min(int(least), size), size - removable, structure.minimum)
        step = self._granule(structure)
        lowest = -(-floor // step) * step
        return np.array([size, *range((size - 1) // step * step, lowest - 1, -step)])

    def _granule(self, structure: Structure) -> int:
        """Units that make up one step of the alignment."""
        align = self._steps.get(structure.role)
        if align is None:
            counted = structure.blocks or structure.role in UNALIGNED
            align = 1 if counted else self._steps.get(ALL, 1)
        return align // math.gcd(align, self.width(structure)) if align > 1 else 1

    @cached_property
    def _steps(self) -> dict[str, int]:
        given = self.align if isinstance(self.align, Mapping) else {ALL: self.align}
        steps: dict[str, int] = {}
        for name, step in given.items():
            role = self.role(name)
            if role in steps:
                raise PlanError(f"{name!r} and {role!r} are the same role", where="align")
            try:
                steps[role] = parse_alignment(step)
            except ValueError as error:
                raise PlanError(str(error), where=f"align {name}") from None
        return steps

    def width(self, structure: Structure) -> int:
        """Positions of one unit in a dimension, such as head_dim for a head of k_proj.

        Dimensions that an operator uses in the structure's role count (queries for qk_dim), or
        else those of its matrices. Where they differ (a query projection has more than a key
        projection) the most common number does, the smaller of equally common ones. Layers have
        no positions, which is 1.
        """
        atom = structure.atom
        if atom is None:
            return 1
        dims = ((self.program.typing.parameters[p], d) for p, d in structure.members)
        exprs = self._used_as.get((atom, structure.role)) or [e[d] for e, d in dims if len(e) > 1]
        owned = (np.count_nonzero(owners(e, atom) != NONE) for e in exprs)
        widths = Counter(max(1, int(n) // structure.size) for n in owned)
        return min(widths, key=lambda w: (-widths[w], w), default=1)

    @cached_property
    def _used_as(self) -> dict[tuple[Atom, str], list[Expr]]:
        found: dict[tuple[Atom, str], list[Expr]] = {}
        for e, role in self.program.typing.hints:
            for atom in dict.fromkeys(atoms(e)):
                found.setdefault((atom, role), []).append(e)
        return found

    def _nothing(self, role: str) -> PlanError:
        structures = self._of_role(role)
        frozen = [s for s in structures if not s.prunable]
        what = f"nothing with role {role!r} can be pruned"
        if not structures:
            unnamed = [s for s in self.by_role.get("", ()) if not s.prunable]
            has = sorted(r for r, found in self.by_role.items() if r and _open(found))
            why = f"frozen axes have no role: {_reasons(unnamed)}" if unnamed else None
            if role in SUBLAYERS:
                why = "it has no layers that are chains of several residual branches"
            if role == "layers":
                fixed = self.program.fixed_layers()
                why = _listed_reasons(fixed.values()) if fixed else "it has no stack of layers"
            return PlanError(
                f"the model has no role {role!r}",
                why=why,
                hint=f"it has {', '.join(has)}" if has else "it has nothing to prune",
            )
        if len(frozen) == len(structures):
            return PlanError(what, why=f"all are frozen: {_reasons(frozen)}")
        if all(s.size == 1 for s in structures if s.prunable):
            return PlanError(what, why="every structure of it has one unit, and one has to stay")
        everything = self.judging_all()
        open_ = [s for s in structures if s.prunable and len(everything.candidate(s).removable)]
        if open_ and all(s.name in self.whole for s in open_):
            return self._unjudged(f"nothing with role {role!r}", open_)
        return PlanError(
            what,
            why="exclude and include leave no structure of it",
            hint=f"for example {structures[0].name} touches {structures[0].members[0][0]}",
        )

    def _unjudged(self, what: str, structures: Sequence[Structure]) -> PlanError:
        return PlanError(
            f"{what} can be judged by the score",
            where=structures[0].name,
            why=_listed_reasons(self.whole[s.name] for s in structures),
            hint="take score block-influence for layers"
            if structures[0].blocks
            else "leave it out, or take another score, such as magnitude",
        )


def _open(structures: Sequence[Structure]) -> bool:
    return any(s.prunable for s in structures)


def _reasons(structures: Sequence[Structure], most: int = 3) -> str:
    return _listed_reasons((s.reason or "frozen" for s in structures), most)


def _listed_reasons(found: Iterable[str], most: int = 3) -> str:
    reasons = Counter(found)
    told = [f"{n} x {reason}" for reason, n in reasons.most_common(most)]
    return "; ".join([*told, *(["..."] if len(reasons) > most else [])])


def _listed(roles: Iterable[str]) -> str:
    return f"the roles are {', '.join(roles)}, {HEADS}"
