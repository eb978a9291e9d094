"""The Hugging Face config of a slim model, solved for instead of listed per architecture.

A config is right when the class builds, on the meta device, a model whose parameters have the
wanted names and shapes. A field is a candidate when its value is a size that the pruning changed;
which candidates are meant is found by building. The search needs no weights, so that a format that
cannot hold a plan can be refused before any work has been done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from graphprune.checkpoints.patch import slim_name
from graphprune.rewrite.config.builds import Builder, Built, quiet
from graphprune.rewrite.config.fields import Data, Path, changes, dotted, edited, integers, unset
from graphprune.rewrite.config.search import State, Verdict, best_first
from graphprune.rewrite.config.shapes import describe, mismatches, uneven
from graphprune.rewrite.config.stacks import shortened, without_layers

Shape = tuple[int, ...]
Pairs = Sequence[tuple[int, int]]

LIMIT = 200
"""Models built on the meta device at most in the first search."""

AGAIN = 40
"""The same for the searches that start from a config with one more field set."""

ALTERNATIVES = 4
"""Fields without influence on shapes that are worth trying in all combinations."""


@dataclass(frozen=True)
class SolvedConfig:
    """What the config of the slim model is, or why there is none.

    Attributes:
        config: The config whose model has the wanted shapes. Where there are problems: the
            original one, without the layers that have left.
        edits: Dotted field to new value, for `config`.
        alternatives: Fields that equal a changed size too and don't influence any shape; only
            the outputs of the model tell whether they are meant.
        dropped: Layers that `config` still has: where no field counts them.
        problems: What no native config can express, and why. Empty: solved.
        builds: How many models were built to find out.
    """

    config: PretrainedConfig
    edits: Mapping[str, Any]
    alternatives: Mapping[Path, int] = field(default_factory=dict)
    dropped: Mapping[str, Sequence[int]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    builds: int = 0

    def candidates(self) -> Iterator[PretrainedConfig]:
        """Yield the config, then the ones with alternatives, those with the fewest first."""
        data = self.config.to_dict()
        items = list(self.alternatives.items())[:ALTERNATIVES]
        for chosen in chain.from_iterable(combinations(items, n) for n in range(len(items) + 1)):
            if not chosen:
                yield self.config
                continue
            try:
                yield type(self.config).from_dict(edited(data, dict(chosen)))
            except Exception:
                continue


@quiet()
def solve_config(
    config: PretrainedConfig,
    model_class: type[nn.Module],
    shapes: Mapping[str, Shape],
    layers: Mapping[str, Sequence[int]],
    hints: Mapping[str, Pairs],
) -> SolvedConfig:
    """Look for the config that makes `model_class` build parameters of the wanted shapes.

    Args:
        config: The config of the original model.
        model_class: The transformers class of the model.
        shapes: Slim name to shape of every parameter and buffer; other names are ignored.
        layers: Path of a stack to the positions of the layers that leave it.
        hints: Module path to the (old, new) sizes of tensors computed in its scope.
    """
    builder = Builder(type(config), model_class)
    original = config.to_dict()
    data, left = _cut(builder, original, layers)
    base = type(config).from_dict(data)
    if left:
        problems = [
            f"no field of {type(config).__name__} counts the layers of '{stack}'" for stack in left
        ]
        edits = changes(original, data, config)
        return SolvedConfig(base, edits, {}, left, tuple(problems), builder.count)
    solver = _Solver(builder, data, shapes, hints)
    solved, problems = solver.solve()
    for pinned in solver.pinned() if solved is None else ():
        again = _Solver(builder, pinned, shapes, hints, AGAIN)
        solved, _ = again.solve()
        if solved is not None:
            solver, problems = again, []
            break
    final = data if solved is None else solved
    return SolvedConfig(
        type(config).from_dict(final),
        changes(original, final, config),
        {} if solved is None else solver.alternatives(solved),
        {},
        tuple(problems),
        builder.count,
    )


@quiet()
def cut_layers(
    config: PretrainedConfig,
    model_class: type[nn.Module],
    layers: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Return the edits, dotted field to value, that layers leaving their stacks mean for a config.

    Stacks that no field counts are left out.
    """
    data = config.to_dict()
    cut, _ = _cut(Builder(type(config), model_class), data, layers)
    return changes(data, cut, config)


def _cut(
    builder: Builder, data: Data, layers: Mapping[str, Sequence[int]]
) -> tuple[Data, dict[str, Sequence[int]]]:
    """Take layers out, stack by stack; also return the stacks where that isn't possible."""
    left: dict[str, Sequence[int]] = {}
    # Inner stacks first, whose paths would change otherwise.
    for stack in sorted(layers, key=lambda path: path.count("."), reverse=True):
        gone = layers[stack]
        before = builder.build(data).built()
        wanted = {
            slim: shape
            for name, shape in before.shapes.items()
            if (slim := slim_name(name, {stack: gone})) is not None
        }
        for option in shortened(data, before.children[stack], gone):
            attempt = builder.build(option)
            if attempt.model is not None and attempt.model.shapes == wanted:
                data = option
                break
        else:
            left[stack] = gone
    return data, left


class _Solver:
    """Searches the fields of one config for the wanted shapes."""

    def __init__(
        self,
        builder: Builder,
        data: Data,
        shapes: Mapping[str, Shape],
        hints: Mapping[str, Pairs],
        limit: int = LIMIT,
    ) -> None:
        self.builder = builder
        self.limit = limit
        self.data = data
        self.base = builder.build(data).built()
        self.wanted = {n: tuple(s) for n, s in shapes.items() if n in self.base.shapes}
        changed = [
            pair
            for name, new in self.wanted.items()
            for pair in zip(self.base.shapes[name], new, strict=True)
            if pair[0] != pair[1]
        ]
        told = [(old, new) for pairs in hints.values() for old, new in pairs if old != new]
        # The commonest change of a size first.
        self.pairs = [pair for pair, _ in Counter([*changed, *told]).most_common()]

    def solve(self) -> tuple[Data | None, list[str]]:
        """Return the data of the solved config, or the problems."""
        if not self._cost(self.base):
            return self.data, []
        per_layer = any(isinstance(path[-1], int) for path, _, _ in self._candidates())
        if not per_layer and (apart := uneven(self.base.shapes, self.wanted)):
            name = self.builder.config_class.__name__
            return None, [f"{text}; {name} has one value for all layers" for text in apart]
        fields = self._fields
        best, cost = self._search(self.data, fields)
        direct = edited(self.data, {p: o[0] for p, o in fields.items() if self._is_direct(p)})
        while cost:
            # The search may have bent other fields to come near what an unset one should give.
            found = self._set_more(direct, cost) or self._set_more(best, cost)
            if found is None:
                return None, self._problems(best)
            direct, cost = found, self._cost(self.builder.build(found).model)
            best = found
            if cost and (searched := self._search(found, fields))[1] < cost:
                best, cost = searched
        return self._trimmed(best), []

    def pinned(self) -> Iterator[Data]:
        """The data with a size set that it left to its default, so that it stays as it is.

        Where a head size is the width divided by the heads, no search over sizes that changed
        finds fewer heads of the same size.
        """
        for path in [*unset(self.data), *self.builder.asked(self.data)]:
            for value in self._derived(path):
                pinned = edited(self.data, {path: value})
                model = self.builder.build(pinned).model
                if model is not None and model.shapes == self.base.shapes and self._holds(pinned):
                    yield pinned

    def _holds(self, pinned: Data) -> bool:
        """Whether some size doesn't follow a field any more that it follows in the data."""
        for path, options in self._fields.items():
            free = self.builder.build(edited(self.data, {path: options[0]})).model
            held = self.builder.build(edited(pinned, {path: options[0]})).model
            if free is not None and held is not None and free.shapes != held.shapes:
                return True
        return False

    def _derived(self, path: Path) -> list[int]:
        """What modules call by the name of a field."""
        known = [
            value
            for (_, name), value in self.base.attributes.items()
            if name == path[-1] and type(value) is int
        ]
        return list(dict.fromkeys(known))

    def alternatives(self, solved: Data) -> dict[Path, int]:
        """The candidates that `solved` leaves alone although they show in the built modules."""
        built = self.builder.build(solved).built()
        found: dict[Path, int] = {}
        values = dict(integers(solved))
        for path, options in self._fields.items():
            if values.get(path) in options:
                continue
            model = self.builder.build(edited(solved, {path: options[0]})).model
            if model is None or model.shapes != built.shapes:
                continue
            if model.attributes != built.attributes:
                found[path] = options[0]
        return found

    def _cost(self, built: Built | None) -> int:
        """How many dimensions are wrong; names that are missing or too many weigh more."""
        assert built is not None
        wrong = mismatches(built.shapes, self.wanted)
        unknown = built.parameters - self.base.shapes.keys()
        return sum(len(dims) or 10 for dims in wrong.values()) + 10 * len(unknown)

    @cached_property
    def _fields(self) -> dict[Path, list[int]]:
        """Integer fields to the values that they may take instead of their own."""
        return {
            path: options
            for path, value, options in self._candidates()
            if not self._counts_layers(path, value, options[0])
        }

    def _candidates(self) -> Iterator[tuple[Path, int, list[int]]]:
        """Fields that equal a size which changes, or divide one: path, value and other values."""
        for path, value in integers(self.data):
            direct = [new for old, new in self.pairs if old == value]
            scaled = [
                new * value // old
                for old, new in self.pairs
                if 1 < value < old and old % value == 0 and (new * value) % old == 0
            ]
            options = direct or scaled
            options = [new for new in dict.fromkeys(options) if new not in (0, value)]
            if options:
                yield path, value, options

    def _counts_layers(self, path: Path, value: int, new: int) -> bool:
        """Whether a field equals a size by coincidence, and another value adds or takes layers."""
        tried = [edited(self.data, {path: new})]
        if new < value:
            tried.append(without_layers(self.data, path, range(new, value)))
        built = (self.builder.build(data).model for data in tried)
        found = next((model for model in built if model is not None), None)
        return found is not None and not self.wanted.keys() <= found.shapes.keys()

    def _is_direct(self, path: Path) -> bool:
        """Whether a field is one of the sizes that changed."""
        return dict(integers(self.data))[path] in {old for old, _ in self.pairs}

    def _search(self, data: Data, fields: Mapping[Path, Sequence[int]]) -> tuple[Data, int]:
        """Choose values for fields; those that equal a changed size change at first."""
        values = dict(integers(self.data))
        choices = [
            [*options, values[path]] if self._is_direct(path) else [values[path], *options]
            for path, options in fields.items()
        ]
        paths = list(fields)

        def apply(state: State) -> Data:
            edits = {p: c[i] for p, c, i in zip(paths, choices, state, strict=True)}
            return edited(data, edits)

        def evaluate(state: State) -> Verdict:
            attempt = self.builder.build(apply(state))
            if attempt.model is None:
                return Verdict(False)
            cost = self._cost(attempt.model)
            return Verdict(not cost, cost)

        state, _ = best_first([len(c) for c in choices], evaluate, self.limit)
        best = apply(state)
        model = self.builder.build(best).model
        if model is None:
            return data, self._cost(self.builder.build(data).model)
        return best, self._cost(model)

    def _set_more(self, data: Data, cost: int) -> Data | None:
        """Set a field that was left to its default, if that gives a lower cost.

        Its value is what a module has derived and calls by the same name (a head size), or a size
        that is still wrong.
        """
        built = self.builder.build(data).model or self.base
        wrong = mismatches(built.shapes, self.wanted)
        sizes = Counter(
            self.wanted[name][dim] for name, dims in wrong.items() for dim in dims
        ).most_common(4)
        news = dict(self.pairs)
        best: tuple[int, Data] | None = None
        for path in [*unset(data), *self.builder.asked(self.data)]:
            known = self._derived(path)
            values = [*known, *(news[v] for v in known if v in news), *(s for s, _ in sizes)]
            for value in dict.fromkeys(values):
                candidate = edited(data, {path: value})
                model = self.builder.build(candidate).model
                if model is not None and (new := self._cost(model)) < (best or (cost,))[0]:
                    best = new, candidate
        return None if best is None else best[1]

    def _trimmed(self, data: Data) -> Data:
        """Take back edits that the shapes don't need: an equal value may be a coincidence."""
        values = dict(integers(self.data))
        for path, value in integers(data):
            if path in values and values[path] != value:
                reverted = edited(data, {path: values[path]})
                model = self.builder.build(reverted).model
                if model is not None and not self._cost(model):
                    data = reverted
        return data

    def _problems(self, data: Data) -> list[str]:
        """Say which parameters the best config gets wrong, and what their sizes follow."""
        built = self.builder.build(data).built()
        follows: dict[tuple[str, int], list[str]] = {}
        for path, options in self._fields.items():
            attempt = self.builder.build(edited(self.data, {path: options[0]}))
            if attempt.model is not None:
                for name, dims in mismatches(attempt.model.shapes, self.base.shapes).items():
                    for dim in dims:
                        follows.setdefault((name, dim), []).append(dotted(path))
        name = self.builder.config_class.__name__
        problems = describe(built.shapes, self.wanted, follows, name)
        refusal = self._refusal(follows)
        if refusal:
            problems.insert(0, f"{name} or its model refuses the direct way: {refusal}")
        return problems

    def _refusal(self, follows: Mapping[tuple[str, int], Sequence[str]]) -> str | None:
        """What the config says to the plan: to the fields that what is to change follows."""
        wrong = mismatches(self.base.shapes, self.wanted)
        meant = {f for n, dims in wrong.items() for dim in dims for f in follows.get((n, dim), ())}
        edits = {}
        for path, options in self._fields.items():
            alone = edited(self.data, {path: options[0]})
            if self._is_direct(path) and (
                dotted(path) in meant or self.builder.build(alone).model is None
            ):
                edits[path] = options[0]
        return self.builder.build(edited(self.data, edits)).error
