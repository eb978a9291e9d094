"""Sites: the operators of a traced graph that multiply an activation by a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from graphprune.analysis.program import BaseProgram
from graphprune.errors import PlanError
from graphprune.streaming.core.layout import Layout

Globs: TypeAlias = Sequence[str]
"""Patterns of parameter names."""


@dataclass(frozen=True, slots=True)
class Site:
    """One operator that multiplies by a parameter.

    Attributes:
        parameter: canonical name of the weight.
        node: name of the value that the operator computes.
        reads: name of the value that the weight is multiplied with, before reshapes.
        operand: name of that value as the operator reads it.
        layout: how the weight and the value are matrices.
        chosen: name of the value that says which expert each row takes; None without a choice.
        path: module path of the operator.
    """

    parameter: str
    node: str
    reads: str
    operand: str
    layout: Layout
    chosen: str | None = None
    path: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that read the same values, so that they share one statistic.

    Attributes:
        index: position in the order of treatment.
        parameters: canonical names, in the order of the graph.
        sites: all their operators, in the order of the graph.
    """

    index: int
    parameters: tuple[str, ...]
    sites: tuple[Site, ...]

    @property
    def parts(self) -> int:
        """Number of statistics: experts, or groups of a convolution; 1 for a linear layer."""
        return self.sites[0].layout.parts

    @property
    def name(self) -> str:
        """Name of the first parameter."""
        return self.parameters[0]

    def layout(self, parameter: str) -> Layout:
        """How `parameter` is a stack of matrices."""
        return next(s.layout for s in self.sites if s.parameter == parameter)


@dataclass(frozen=True)
class Sites:
    """The sites of a program.

    Attributes:
        groups: what is to be treated, in the order of the graph.
        skipped: every other matrix to the reason why it is left alone.
        all: every site found, chosen or not, by the name of its node.
    """

    groups: tuple[Group, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    all: dict[str, Site] = field(default_factory=dict)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names of the weights that are treated, in order."""
        return tuple(p for g in self.groups for p in g.parameters)


def selected(
    program: BaseProgram,
    found: Mapping[str, list[Site]],
    skipped: dict[str, str],
    reasons: dict[str, str],
    places: Mapping[str, int],
    include: Sequence[str] | None,
    exclude: Sequence[str],
) -> Sites:
    """The sites that globs leave, in groups.

    Args:
        program: the program.
        found: parameter to its sites.
        skipped: parameters that can't be treated, to the reason.
        reasons: those that aren't unless they are asked for by their full name, to the reason.
        places: value name to its place in the order of the graph.
        include: globs of parameter names to choose from; None for all.
        exclude: globs of parameter names to leave out.

    Raises:
        PlanError: see `find_sites`.
    """
    everything = {s.node: s for sites in found.values() for s in sites}
    for name in found:
        names = [name, *(a for a, c in program.aliases.items() if c == name)]
        if not set(names).isdisjoint(include or ()):
            reasons.pop(name, None)
        if include is not None and not _matches(names, include):
            reasons[name] = "not included"
        elif _matches(names, exclude):
            reasons[name] = "excluded"
    skipped |= reasons
    chosen = {name: sites for name, sites in found.items() if name not in reasons}
    _check_globs(program, include or (), exclude, chosen, skipped)
    if not chosen:
        raise PlanError(
            "there is no weight to treat",
            why=_reasons(skipped) or "no parameter is a matrix that an activation is multiplied by",
            hint="include parameters by name, or exclude fewer",
        )
    return Sites(_grouped(places, chosen), skipped, everything)


def _grouped(places: Mapping[str, int], chosen: dict[str, list[Site]]) -> tuple[Group, ...]:
    """Parameters that read the same values in the same way, in the order of their barriers."""
    members: dict[Any, list[str]] = {}
    for name, sites in chosen.items():
        key = tuple((s.reads, s.chosen, s.layout.gathering) for s in sites)
        members.setdefault(key, []).append(name)
    groups: list[tuple[int, list[str], list[Site]]] = []
    for names in members.values():
        sites = sorted((s for n in names for s in chosen[n]), key=lambda s: places[s.node])
        order = list(dict.fromkeys(s.parameter for s in sites))
        groups.append((max(first_reads(sites, places).values()), order, sites))
    groups.sort(key=lambda g: g[0])
    return tuple(
        Group(index, tuple(names), tuple(sites)) for index, (_, names, sites) in enumerate(groups)
    )


def first_reads(
    sites: Iterable[Site], places: Mapping[str, int]
) -> dict[tuple[str, str | None], int]:
    """(value, choice of experts) to the place of the first of `sites` that reads it."""
    first: dict[tuple[str, str | None], int] = {}
    for site in sites:
        key = (site.reads, site.chosen)
        first[key] = min(first.get(key, places[site.node]), places[site.node])
    return first


def _check_globs(
    program: BaseProgram,
    include: Sequence[str],
    exclude: Sequence[str],
    chosen: dict[str, list[Site]],
    skipped: dict[str, str],
) -> None:
    for glob in (*include, *exclude):
        matched = [n for n in program.parameters if fnmatchcase(n, glob)]
        if not matched:
            raise PlanError(
                f"no parameter matches {glob!r}",
                hint=f"globs are of parameter names, such as {next(iter(program.trainable), '')!r}",
            )
        names = dict.fromkeys(program.aliases.get(n, n) for n in matched)
        if glob in include and not chosen.keys() & names.keys():
            tied = program.aliases
            shown = {n: f"{n}, tied to {tied[n]}" if n in tied else n for n in matched}
            why = _reasons(
                {shown[n]: skipped.get(tied.get(n, n), "it is no matrix") for n in matched}
            )
            raise PlanError(f"nothing that {glob!r} matches is to be treated", why=why)


def _matches(names: Iterable[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(n, g) for n in names for g in globs)


def _reasons(skipped: dict[str, str], limit: int = 4) -> str:
    """The first few reasons, in words."""
    shown = [f"{name}: {reason}" for name, reason in list(skipped.items())[:limit]]
    if len(skipped) > limit:
        shown.append(f"and {len(skipped) - limit} more")
    return "; ".join(shown)
