"""REAP: what an expert adds to the tokens that are routed to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.torch.liveness import live_nodes, values_read
from graphprune.ir.torch.program import Program
from graphprune.passes.shared.forward import samples_of, show_all, sites_of, traced_program
from graphprune.passes.shared.score import Inputs
from graphprune.plan.units import FloatArray, pair_sums, unit_sums
from graphprune.ranks.group import current
from graphprune.streaming.core.layout import Experts
from graphprune.streaming.core.padding import Padding
from graphprune.streaming.core.sites import Site
from graphprune.streaming.torch.products import bind, operator

NAME = "reap"

# They leave the order of a value's numbers alone.
_SAME = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze to _to_copy alias detach clone "
    "contiguous".split()
)
_CHOICES = frozenset("index index_select embedding".split())


@dataclass(frozen=True)
class Reap:
    """The mean of ``g_e(x) * ||f_e(x)||_2`` over the tokens x that are routed to expert e.

    g is the weight that the router gives the expert, as the model applies it, and f what the
    expert computes. Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE
    Compression, 2025 (arXiv:2510.13999). An expert that no token chose has score 0, and a warning
    names it. A group of experts has the sum of its experts' scores.

    Attributes:
        batch: calibration samples per forward pass, where calibration is a tensor or a mapping.
    """

    needs_data: ClassVar[bool] = True
    batch: int = 4

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise PlanError("a batch has at least one window", where=f"score {NAME}")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every expert; see `graphprune.passes.shared.score.Score`.

        Norms are summed in float64 from activations in float32.

        Raises:
            PlanError: a structure is none of experts, the graph doesn't show the weights of its
                router, the model is no PyTorch graph, there is no calibration data, or a result of
                an expert isn't finite.
        """
        for s in structures:
            if s.role not in ("experts", "expert_groups"):
                raise PlanError(
                    f"score {NAME} is for experts",
                    where=f"structure {s.name}, role {s.role}",
                    hint="select them in a run of their own, with remove: {experts: ...}",
                )
        traced = traced_program(program, NAME)
        samples = samples_of(traced, inputs.calibration, NAME, self.batch)
        places = {s.name: _place(traced, s) for s in structures}
        means = _means(traced, {p.weighted: p for p in places.values()}.values(), samples)
        scores = {}
        for s in structures:
            place = places[s.name]
            e = program.typing.parameters[place.site.parameter][0]
            assert s.atom is not None  # only stacks of layers have none
            values = means[place.weighted]
            scores[s.name] = (
                unit_sums(values, e, s.atom)
                if s.within is None
                else pair_sums(values, e, s.within, s.atom)
            )[None]
        return scores


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the results of a stack of experts meet the weights of the router.

    Attributes:
        site: the last product of the experts.
        weighted: name of the value that holds each result times its weight.
    """

    site: Site
    weighted: str


def _means(
    program: Program, found: Iterable[_Place], samples: Sequence[Batch]
) -> dict[str, FloatArray]:
    """The mean norm of the weighted results of every expert, by the name of their value."""
    places = list(found)
    padding = Padding(program)
    total = {p.weighted: torch.zeros(p.site.layout.parts, dtype=torch.float64) for p in places}
    tokens = {p.weighted: torch.zeros(p.site.layout.parts, dtype=torch.int64) for p in places}
    seen: dict[str, Tensor] = {}

    def see(name: str, value: Tensor, batch: Batch) -> None:
        seen[name] = value
        for place in places:
            if place.weighted != name:
                continue
            assert place.site.chosen is not None
            chosen = seen[place.site.chosen].flatten().cpu()
            norms = torch.linalg.vector_norm(seen.pop(name), dim=-1, dtype=torch.float64)
            norms = norms.flatten().cpu()
            kept = padding.rows(place.site, seen.pop(place.site.reads), batch.valid)
            if kept is not None:
                chosen, norms = chosen[kept.cpu()], norms[kept.cpu()]
            if not bool(norms.isfinite().all()):
                raise PlanError(
                    "what an expert computes is not finite",
                    where=f"{place.site.parameter}, samples {batch.first} to "
                    f"{batch.first + batch.count - 1}",
                    hint="check the calibration data and the checkpoint for NaN",
                )
            total[name].index_add_(0, chosen, norms)
            tokens[name] += torch.bincount(chosen, minlength=len(tokens[name]))

    wanted = {v for p in places for v in (p.site.chosen, p.site.reads, p.weighted) if v}
    show_all(program, wanted, samples, see, seen.clear)
    total = {name: current().add(own) for name, own in total.items()}
    tokens = {name: current().add(own) for name, own in tokens.items()}
    for place in places:
        idle = np.flatnonzero(tokens[place.weighted].numpy() == 0).tolist()
        if idle:
            warnings.warn(
                f"no calibration token chose {len(idle)} experts of {place.site.parameter}: "
                f"{', '.join(map(str, idle))}; their score is 0",
                stacklevel=4,
            )
    return {n: (total[n] / tokens[n].clamp(min=1)).numpy() for n in total}


def _place(program: Program, structure: Structure) -> _Place:
    """Where a structure's experts meet the weights of their router.

    Raises:
        PlanError: the graph doesn't show it.
    """
    own = {program.aliases.get(p, p) for p, _ in structure.members}
    places = {n.name: i for i, n in enumerate(program.exported.graph.nodes)}
    sites = [s for s in sites_of(program).all.values() if s.parameter in own]
    experts = [s for s in sites if isinstance(s.layout, Experts) and s.chosen is not None]
    why = "its weights are in no product with one chosen expert for each token"
    if experts:
        last = max(experts, key=lambda s: places[s.node])
        weighted, why = _weighted(program, last)
        if weighted is not None:
            return _Place(last, weighted)
    raise PlanError(
        f"score {NAME} doesn't see what the router gives an expert",
        where=f"structure {structure.name}",
        why=why,
        hint="use score magnitude or taylor",
    )


def _weighted(program: Program, site: Site) -> tuple[str | None, str]:
    """The product of the experts' results with the router's weights, or why there is none."""
    named = {n.name: n for n in program.exported.graph.nodes}
    live = live_nodes(program.exported.graph)
    node = named[site.node]
    while True:
        users = [u for u in node.users if u in live and node in values_read(u)]
        if len(users) != 1:
            return None, f"{len(users)} operators read what the experts compute"
        (user,) = users
        kind = operator(user)
        others = [n for n in user.all_input_nodes if n is not node and _rank(n) >= 0]
        if kind == "mul" and len(others) == 1:
            if _is_gate(others[0], user, named[site.node]):
                return str(user.name), ""
            return None, "it is multiplied by something else than a number for each token"
        same = kind in _SAME or (kind == "dropout" and not bind(user)["train"])
        bias = kind == "add" and len(others) == 1 and _is_chosen_bias(others[0], node)
        if not (same or bias):
            return None, f"{kind or user.op} reads what the experts compute"
        node = user


def _is_gate(value: fx.Node, product: fx.Node, result: fx.Node) -> bool:
    """Whether a value is a computed number for each row of a product, and not of the result."""
    if value.op == "placeholder" or _rank(value) != _rank(product):
        return False
    shape, whole = value.meta["val"].shape, product.meta["val"].shape
    if list(shape[:-1]) != list(whole[:-1]) or not isinstance(shape[-1], int) or shape[-1] != 1:
        return False
    waiting, seen = [value], {value}
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node is result:
                return False
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return True


def _is_chosen_bias(value: fx.Node, result: fx.Node) -> bool:
    """Whether a value has the shape of the result, and holds rows of a parameter."""
    if list(value.meta["val"].shape) != list(result.meta["val"].shape):
        return False
    while operator(value) in _SAME:
        value = value.args[0]  # type: ignore[assignment]
    table = value.args[0] if operator(value) in _CHOICES and value.args else None
    while isinstance(table, fx.Node) and operator(table) in _SAME:
        table = table.args[0]
    return isinstance(table, fx.Node) and table.op == "placeholder"


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1
