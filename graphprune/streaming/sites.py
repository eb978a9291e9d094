"""Sites: the operators of a traced graph that multiply an activation by a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from graphprune.analysis.liveness import live_nodes
from graphprune.errors import PlanError
from graphprune.program import BaseProgram, Program
from graphprune.streaming.layout import Layout
from graphprune.streaming.products import followed, origin, product_site
from graphprune.streaming.scope import unwanted


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


def find_sites(
    program: Program,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    every: bool = False,
) -> Sites:
    """Find where weights are applied, and group those that read the same value.

    Matrices of linear layers, convolutions and experts are taken. Routers, depthwise kernels,
    single outputs and what computes an output of the model are only if `include` has their full
    name; a weight whose other uses are no such products (an embedding that is the output layer too)
    never is.

    Args:
        program: a traced program.
        include: globs of parameter names to choose from; None for all.
        exclude: globs of parameter names to leave out.
        every: whether those are taken, too, that only a full name brings in otherwise.

    Raises:
        PlanError: nothing is left to treat, or a glob matches nothing that could be.
    """
    found: dict[str, list[Site]] = {}
    skipped: dict[str, str] = {}
    live = live_nodes(program.exported.graph)
    places = {n: i for i, n in enumerate(program.exported.graph.nodes)}
    for name, nodes in _matrices(program).items():
        sites = _sites_of(name, nodes, live, places)
        if isinstance(sites, str):
            skipped[name] = sites
        else:
            found[name] = sites
    reasons = {} if every else unwanted(program, found)
    order = {n.name: i for n, i in places.items()}
    return selected(program, found, skipped, reasons, order, include, exclude)


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
        program: it.
        found: parameter to its sites.
        skipped: parameters that can't be treated, to the reason.
        reasons: those that aren't unless they are asked for by their full name, to the reason.
        places: value name to its place in the order of the graph.
        include: see `find_sites`.
        exclude: likewise.

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


def _matrices(program: Program) -> dict[str, list[fx.Node]]:
    """Canonical names of floating parameters with two dimensions or more, to their values."""
    placeholders = {n.name: n for n in program.exported.graph.nodes if n.op == "placeholder"}
    found: dict[str, list[fx.Node]] = {}
    for spec in program.exported.graph_signature.input_specs:
        if spec.target is None:
            continue
        name = program.aliases.get(spec.target, spec.target)
        node = placeholders.get(spec.arg.name)
        value = node.meta.get("val") if node is not None else None
        if name in program.trainable and isinstance(value, torch.Tensor) and value.dim() > 1:
            assert node is not None
            found.setdefault(name, []).append(node)
    return found


def _sites_of(
    name: str, nodes: Iterable[fx.Node], live: set[fx.Node], places: dict[fx.Node, int]
) -> list[Site] | str:
    """The sites of a parameter, or why it can't be treated."""
    sites: list[tuple[int, Site]] = []
    for node in nodes:
        if not node.meta["val"].is_floating_point():
            return f"its dtype is {node.meta['val'].dtype}"
        for user, view in followed(node, live):
            if isinstance(view, str):
                return view
            result = product_site(user, view)
            if isinstance(result, str):
                return result
            layout, operand = result
            sites.append((places[user], _site(name, user, operand, layout, view.chosen)))
    if not sites:
        return "nothing reads it"
    ordered = [site for _, site in sorted(sites, key=lambda pair: pair[0])]
    if len({s.layout for s in ordered}) > 1:
        return "its uses take it for different matrices"
    return ordered


def _site(
    name: str, user: fx.Node, operand: fx.Node, layout: Layout, chosen: fx.Node | None
) -> Site:
    from graphprune.analysis.layers import module_path

    return Site(
        parameter=name,
        node=user.name,
        reads=origin(operand, layout).name,
        operand=operand.name,
        layout=layout,
        chosen=None if chosen is None else chosen.name,
        path=module_path(user),
    )


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
