"""What trains of a model: which parameters, with which adapters and masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer

from graphprune.errors import TrainingError
from graphprune.training.core.options import Training
from graphprune.training.core.processes import assign, full, local
from graphprune.training.model.adapters import Adapter, Draw, compute_beside
from graphprune.training.model.held import HeldMasks
from graphprune.training.model.student import Student


@dataclass
class Trainable:
    """The parameters that an optimiser changes, and what keeps masks.

    Attributes:
        student: the model; parametrised where it has adapters.
        names: raw parameter name to what it is in the module: "layer.weight", "layer.weight.a".
        adapted: canonical names of the weights with adapters.
        held: masks of raw weights.
        draw: what everything random in a forward pass depends on.
        places: canonical names of weights that are parametrised since, to where the raw ones are.
    """

    student: Student
    names: Mapping[str, str]
    adapted: tuple[str, ...]
    held: HeldMasks
    draw: Draw
    places: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Raw parameters as they are now: what wraps the module may have replaced them."""
        module = self.student.module
        return {name: module.get_parameter(path) for name, path in self.names.items()}

    @torch.no_grad()
    def merge(self) -> None:
        """Move what adapters have learned into the weights, in their own precision."""
        for name in self.adapted:
            adapter = self.adapter(name)
            if not full(adapter.b).any():
                continue
            weight = self.original(name)
            merged = adapter.effective(
                full(weight), full(adapter.a), full(adapter.b), adapter.removed
            )
            assign(weight, merged)
            local(adapter.b).zero_()

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The weights that trained, whole, by canonical name; adapters are merged before."""
        module = self.student.module
        thin = {f"{name}.{part}" for name in self.adapted for part in "ab"}
        found = {n: full(module.get_parameter(p)) for n, p in self.names.items() if n not in thin}
        for name in self.adapted:
            found[name] = full(self.original(name))
        return found

    def weight(self, name: str) -> Tensor:
        """A weight that stays as it is."""
        return self.student.module.get_parameter(self.places.get(name, name))

    def parametrize(self, name: str, change: nn.Module) -> None:
        """Have a weight go through a change, under all of its names, whenever it is used.

        What trains stays the raw weight, whose masks are held.

        Args:
            name: canonical.
            change: takes a weight, and gives one of its shape.
        """
        for owner, leaf in owners(self.student, name):
            parametrize.register_parametrization(owner, leaf, change, unsafe=True)
        path, _, leaf = name.rpartition(".")
        place = f"{path}.parametrizations.{leaf}.original".lstrip(".")
        before = self.places.get(name, name)
        self.places = {**self.places, name: place}
        self.names = {n: place if p == before else p for n, p in self.names.items()}
        kept = {place if n == before else n: m for n, m in self.held.kept.items()}
        self.held = HeldMasks(self.student.module, kept)

    @torch.no_grad()
    def remove(self, removed: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Hold more zeros from now on, in the middle of training.

        Args:
            removed: canonical name to bool of the weight's shape: True where a zero is to be.
            optimizer: whose memory of these weights becomes 0 too.
        """
        raw = dict(self.held.kept)
        for name, mask in removed.items():
            if name in self.adapted:
                local(self.original(name)).masked_fill_(self.adapter(name).remove(mask), 0.0)
            else:
                raw[name] = raw[name] & ~mask if name in raw else ~mask
        self.held = HeldMasks(self.held.module, raw)
        self.held.fill()
        if optimizer is not None:
            self.held.fill_state(optimizer)

    def original(self, name: str) -> nn.Parameter:
        """The weight that an adapter adds to."""
        path = self.names[f"{name}.a"].removesuffix(".0.a")
        return self.student.module.get_parameter(f"{path}.original")

    def adapter(self, name: str) -> Adapter:
        """The adapter of a weight."""
        found = self.student.module.get_submodule(self.names[f"{name}.a"].removesuffix(".a"))
        assert isinstance(found, Adapter)
        return found


def make_trainable(
    student: Student,
    training: Training,
    held: HeldMasks,
    layouts: Mapping[str, Any],
) -> Trainable:
    """Choose what trains, and add adapters to it.

    Args:
        student: the model; its parameters that train get ``requires_grad``.
        training: options.
        held: masks of the student's weights, by canonical names.
        layouts: canonical name of every weight that may get an adapter to its layout.

    Raises:
        TrainingError: a glob or a mask fits nothing, or nothing is left to train.
    """
    unknown = sorted(held.kept.keys() - student.names.keys())
    if unknown:
        raise TrainingError(
            "a mask belongs to no weight",
            where=unknown[0],
            hint="name parameters as the program does; tied ones by their first name",
        )
    vectors = {n for n in student.names if student.module.get_parameter(n).dim() < 2}
    biases = {n for n in vectors if n.rpartition(".")[2].endswith("bias")}
    kinds = {"full": set(student.names), "norms": vectors, "lora": set(layouts), "frozen": set()}
    chosen = _chosen(student, kinds[training.train], training.include, training.exclude)
    beside = {"biases": biases, "norms": vectors - biases}
    also = [n for n in student.names if any(n in beside[kind] for kind in training.also)]
    if not chosen and not also and training.train != "frozen":
        raise TrainingError("there is nothing to train", hint="include more, or exclude less")
    adapted = tuple(chosen) if training.train == "lora" else ()
    names = {n: n for n in (*chosen, *also) if n not in adapted}
    places: dict[str, str] = {}
    for name in names:
        student.module.get_parameter(name).requires_grad_(True)
    draw = Draw()
    for name in adapted:
        path = _adapt(student, name, training, layouts[name], held.kept.get(name), draw)
        names |= {f"{name}.a": f"{path}.a", f"{name}.b": f"{path}.b"}
        places[name] = f"{path.removesuffix('.0')}.original"
    raw = {n: m for n, m in held.kept.items() if n not in adapted}
    return Trainable(student, names, adapted, HeldMasks(student.module, raw), draw, places)


def owners(student: Student, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Every module that has a parameter, and what it calls it."""
    for alias in student.names[name]:
        path, _, leaf = alias.rpartition(".")
        owner = student.module.get_submodule(path)
        if hasattr(owner, leaf):
            yield owner, leaf


def _adapt(
    student: Student,
    name: str,
    training: Training,
    layout: Any,
    kept: Tensor | None,
    draw: Draw,
) -> str:
    """Add an adapter to a weight, one for all of its names; its path in the module."""
    weight = student.module.get_parameter(name)
    removed = None if kept is None else ~kept
    adapter = Adapter(
        name, weight, layout, training.rank, training.alpha, removed, training.dropout, draw,
        training.seed,
    )  # fmt: skip
    for owner, leaf in owners(student, name):
        kind = type(owner)
        parametrize.register_parametrization(owner, leaf, adapter, unsafe=True)
        if kind is nn.Linear:  # a class of its own may compute something else
            compute_beside(owner, adapter)
    path, _, leaf = name.rpartition(".")
    return f"{path}.parametrizations.{leaf}.0".lstrip(".")


def _chosen(
    student: Student, candidates: set[str], include: Sequence[str] | None, exclude: Sequence[str]
) -> list[str]:
    """The candidates that globs leave."""
    for glob in (*(include or ()), *exclude):
        if not any(fnmatchcase(n, glob) for names in student.names.values() for n in names):
            raise TrainingError(
                f"no parameter matches {glob!r}",
                hint=f"globs are of parameter names, such as {next(iter(student.names))!r}",
            )

    def matches(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatchcase(alias, glob) for alias in student.names[name] for glob in globs)

    return [
        name
        for name in student.names
        if name in candidates
        and (include is None or matches(name, include))
        and not matches(name, exclude)
    ]
