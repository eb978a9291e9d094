"""Trying values of size attributes on a resized module, and watching where it fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphprune.checkpoints.patch import Patch, apply_patch
from graphprune.rewrite.config.search import State, Verdict

Check = Callable[[nn.Module], bool]
Edits = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """What to do with one attribute of all modules at one place.

    Attributes:
        options: The alternatives, likeliest first: module path to edits. Fewer than two: none.
        certain: Edits that need no choice.
    """

    options: tuple[Mapping[str, Edits], ...]
    certain: Mapping[str, Edits]


def place(path: str) -> str:
    """Return a module path with its numbers left open: "layers.3.mlp" is at "layers.*.mlp"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


class Trials:
    """Tries the options of choices on one resized module."""

    def __init__(self, module: nn.Module, choices: Sequence[Choice], check: Check) -> None:
        self.module = module
        self.choices = choices
        self.check = check
        self.places = [{place(p) for o in choice.options for p in o} for choice in choices]
        self.originals = merge(
            {
                path: {name: getattr(module.get_submodule(path), name) for name in edits}
                for path, edits in option.items()
            }
            for choice in choices
            for option in choice.options
        )

    def edits(self, state: State) -> dict[str, dict[str, Any]]:
        """The attributes that a state changes."""
        return merge(c.options[i] for c, i in zip(self.choices, state, strict=True))

    def attempt(self, state: State) -> tuple[bool, list[str], str | None, Exception | None]:
        """Set the attributes and check.

        Returns:
            Whether it passed, the paths of the module calls that came to their end, the path of
            the module that was running when an exception came, and that exception.
        """
        apply_patch(self.module, Patch(attributes=self.originals))
        apply_patch(self.module, Patch(attributes=self.edits(state)))
        with _calls(self.module) as (finished, running):
            try:
                passed, error = self.check(self.module), None
            except Exception as caught:  # anything that a model's code raises on wrong sizes
                passed, error = False, caught
        # A check may have caught what came of a run in another dtype, and pass all the same.
        culprit = running[-1] if running and not passed else None
        return passed, finished, culprit, error

    def evaluate(self, state: State) -> Verdict:
        """Prefer states that get further, and suspect what the failing module is made of."""
        passed, finished, culprit, _ = self.attempt(state)
        if culprit is None:
            return Verdict(passed, -float(len(finished)))
        parts = place(culprit).split(".")
        trail = [".".join(parts[:i]) for i in range(len(parts), 0, -1)] + [""]
        distance = [
            min(trail.index(p) if p in trail else len(trail) for p in places)
            for places in self.places
        ]
        reached = {place(path) for path in finished} | set(trail)
        focus = sorted(range(len(distance)), key=distance.__getitem__)
        called = [i for i in focus if self.places[i] & reached]
        later = [i for i in focus if i not in called]
        return Verdict(False, -float(len(finished)), called, later)

    def failure(self, state: State) -> tuple[str | None, Exception | None]:
        """Where and how a state fails."""
        _, _, culprit, error = self.attempt(state)
        return culprit, error

    def trim(self, state: State) -> dict[str, dict[str, Any]]:
        """Take back what was changed without need, and return the edits that remain.

        An attribute that the run reads and that makes no difference to it is more likely a
        coincidence (a window, a limit) than a size. One that nothing reads stays as changed.
        """
        apply_patch(self.module, Patch(attributes=self.originals))
        apply_patch(self.module, Patch(attributes=self.edits(state)))
        reads = self._reads(self.edits(state))
        for i, choice in enumerate(self.choices):
            keep = [k for k, option in enumerate(choice.options) if not any(option.values())]
            changes = {(path, name) for path, e in choice.options[state[i]].items() for name in e}
            if keep and changes & reads:
                reverted = (*state[:i], keep[0], *state[i + 1 :])
                if self.attempt(reverted)[0]:
                    state = reverted
        return self.edits(state)

    def _reads(self, watched: Mapping[str, Edits]) -> set[tuple[str, str]]:
        """Which of the watched attributes the check reads."""
        reads: set[tuple[str, str]] = set()
        modules = {path: self.module.get_submodule(path) for path in watched}
        classes = {path: type(inner) for path, inner in modules.items()}
        for path, inner in modules.items():
            inner.__class__ = _spying(classes[path], path, watched[path], reads)
        try:
            self.check(self.module)
        finally:
            for path, inner in modules.items():
                inner.__class__ = classes[path]
        return reads


def _spying(
    cls: type[nn.Module], path: str, names: Edits, reads: set[tuple[str, str]]
) -> type[nn.Module]:
    """A subclass that notes which of the named attributes are read."""

    def getter(self: nn.Module, name: str) -> Any:
        if name in names:
            reads.add((path, name))
        return cls.__getattribute__(self, name)

    return type(cls.__name__, (cls,), {"__getattribute__": getter, "__module__": cls.__module__})


@contextmanager
def _calls(module: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Note the paths of module calls: those that have ended, and those under way."""
    finished: list[str] = []
    running: list[str] = []
    handles = []
    for path, inner in module.named_modules():
        handles.append(inner.register_forward_pre_hook(lambda *_, p=path: running.append(p)))
        handles.append(inner.register_forward_hook(lambda *_, r=running: finished.append(r.pop())))
    try:
        yield finished, running
    finally:
        for handle in handles:
            handle.remove()


def merge(edits: Iterable[Mapping[str, Edits]]) -> dict[str, dict[str, Any]]:
    """Join edits, later ones first in rank; modules without any are left out."""
    merged: dict[str, dict[str, Any]] = {}
    for mapping in edits:
        for path, names in mapping.items():
            if names:
                merged.setdefault(path, {}).update(names)
    return merged
