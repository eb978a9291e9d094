"""Selectors: how people say which structures they mean.

A selector is a glob of parameter names, narrowed down by a dimension, a part of one, or a role::

    model.layers.0.*                   all structures that touch these parameters
    *.q_proj.weight:0                  those in dimension 0 of these parameters
    *.q_proj.weight:0/1                that part of the dimension's expression: heads * dim -> dim
    model.layers.[4-9].*/ffn           those of a role that touch these parameters
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from graphprune.errors import PlanError

if TYPE_CHECKING:
    from graphprune.analysis.program import BaseProgram
    from graphprune.analysis.structure import Block, Structure

P = TypeVar("P", bound="BaseProgram")

_FORM = re.compile(
    r"(?P<glob>[^:/]+)(?::(?P<dim>-?\d+)(?P<path>(?:/\d+)*))?(?:/(?P<role>[A-Za-z_]\w*))?"
)
EXPECTED = "a glob of parameter names, with :DIMENSION or /ROLE behind it where that is needed"

HEADS = "heads"
"""What people call a key-value head with its query heads; see `own_name`."""


def own_name(role: str, known: Container[str]) -> str:
    """The name that a model's own roles have for `role`.

    ``heads`` means one thing everywhere: a key-value head with the query heads that read it, which
    is simply a head where every query head has its own. In a model whose query heads all share one
    key-value head, which has to stay, it means the query heads.

    Args:
        role: as a person gave it.
        known: roles of the model.
    """
    if role != HEADS:
        return role
    return "kv_heads" if "kv_heads" in known else "query_heads"


@dataclass(frozen=True)
class Selector:
    """A parsed selector.

    Attributes:
        text: as it was written.
        glob: of parameter names.
        dim: a dimension of these parameters; None means any.
        path: of one part of that dimension's expression, "/0/1"; "" means all of it.
        role: of the structures; None means any.
    """

    text: str
    glob: str
    dim: int | None = None
    path: str = ""
    role: str | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read a selector.

        Raises:
            ValueError: it is none.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not {EXPECTED}")
        dim = None if found["dim"] is None else int(found["dim"])
        return cls(text, found["glob"], dim, found["path"] or "", found["role"])

    def bind(self, program: BaseProgram, where: str | None = None) -> Bound:
        """The selector for one program.

        Args:
            program: the program.
            where: what the selector is for, for errors.

        Raises:
            PlanError: no parameter matches, none that does has such a dimension, or the model has
                no such role.
        """
        shapes = program.parameters
        found = [n for n in shapes if fnmatchcase(n, self.glob)]
        where = f"{where}: {self.text}" if where else self.text
        if not found:
            raise PlanError(
                f"no parameter matches {self.glob!r}",
                where=where,
                hint=f"globs are of parameter names, such as {next(iter(shapes), '')!r}",
            )
        roles = dict.fromkeys(s.role for s in program.structures if s.prunable)
        own = None if self.role is None else own_name(self.role, roles)
        if own not in (None, *roles):
            roles |= dict.fromkeys(s.role for s in program.sublayers)
        if own is not None and own not in roles:
            raise PlanError(
                f"the model has no role {self.role!r}",
                where=where,
                hint=f"it has {', '.join(roles) or 'nothing to prune'}",
            )
        dims: dict[str, int | None] = dict.fromkeys(found)
        if self.dim is not None:
            places = {n: self.dim + len(shapes[n]) * (self.dim < 0) for n in found}
            dims = {n: d for n, d in places.items() if 0 <= d < len(shapes[n])}
        if not dims:
            raise PlanError(
                f"no parameter that {self.glob!r} matches has a dimension {self.dim}",
                where=where,
                why=f"{found[0]} has {len(shapes[found[0]])} dimensions",
            )
        return Bound(
            replace(self, role=own), {program.aliases.get(n, n): d for n, d in dims.items()}
        )


@dataclass(frozen=True)
class Bound:
    """A selector for one program.

    Attributes:
        selector: the selector.
        dims: canonical names of the parameters it matches, with the dimension it means.
    """

    selector: Selector
    dims: Mapping[str, int | None]

    def touches(self, structure: Structure) -> bool:
        """Whether a structure is meant; of a stack of layers any of its layers."""
        chosen = self.selector
        if structure.blocks:
            return any(self.touches_block(b, structure) for b in structure.blocks)
        if chosen.role not in (None, structure.role):
            return False
        if chosen.path:
            name, _, place = structure.name.rpartition(":")
            return name in self.dims and place == f"{self.dims[name]}{chosen.path}"
        return any(self.dims.get(p, -1) in (None, d) for p, d in structure.members)

    def touches_block(self, block: Block, structure: Structure) -> bool:
        """Whether a layer, or a branch, is meant; a dimension is none, nor is another role."""
        return self.selector.dim is None and self.protects(block, structure)

    def protects(self, block: Block, structure: Structure) -> bool:
        """Whether a layer owns something of what is meant, so that it goes with the layer."""
        if self.selector.role not in (None, structure.role if structure.parent else "layers"):
            return False
        return not self.dims.keys().isdisjoint(block.parameters)


def bind_all(texts: Iterable[str], program: BaseProgram, where: str) -> tuple[Bound, ...]:
    """Read several selectors and bind them.

    Raises:
        PlanError: one of them is none, or matches nothing.
    """
    try:
        selectors = [Selector.parse(text) for text in texts]
    except ValueError as error:
        raise PlanError(str(error), where=where) from None
    return tuple(s.bind(program, where) for s in selectors)


def named(program: P, names: Mapping[str, str]) -> P:
    """A program whose structures have roles of one's own.

    A plan made for it fits the original program too: roles are names, and nothing else.

    Args:
        program: it stays as it is.
        names: selector to role. Of several that mean one structure the last one counts.

    Raises:
        PlanError: a selector means no structure that can be pruned, or a role is no word.
    """
    structures = list(program.structures)
    roles = {s.role for s in structures}
    for text, word in names.items():
        if not word.isidentifier():
            raise PlanError(f"{word!r} is not a word that can name a role", where=f"names {text}")
        role = own_name(word, roles)
        (bound,) = bind_all([text], program, "names")
        found = [i for i, s in enumerate(program.structures) if s.prunable and bound.touches(s)
                 and (not s.blocks or bound.selector.role)]  # fmt: skip
        if not found:
            raise PlanError(
                f"{text!r} means no structure that can be pruned",
                where="names",
                hint="graphprune inspect --why PARAMETER says what a dimension belongs to",
            )
        for i in found:
            structures[i] = replace(structures[i], role=role)
    if not names:
        return program
    return replace(program, structures=tuple(structures))
