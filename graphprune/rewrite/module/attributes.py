"""Finding the resize patch of a module: which of its attributes are sizes that have changed.

Layers of torch.nn say by their parameters what they need. Everything else is found by value: an
integer that equals a size which the pruning changed in that module's scope may be that size, or
may equal it by coincidence, and only running the module tells. Modules at the same place of
repeated layers ("layers.*.attention") decide together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphprune.checkpoints.patch import (
    Patch,
    apply_patch,
    named_tensors,
    owner_of,
    skeleton,
    slim_name,
)
from graphprune.errors import EmitError
from graphprune.rewrite.config.search import best_first
from graphprune.rewrite.config.trials import Check, Choice, Edits, Trials, merge, place
from graphprune.rewrite.module.layers import layer_sizes

Shape = tuple[int, ...]
Pairs = Sequence[tuple[int, int]]

INDEX = re.compile(r"(idx|index|layer_id)$")
LONGEST = 16  # a longer list of integers is a table, not a size


def find_patch(
    module: nn.Module,
    shapes: Mapping[str, Shape],
    dropped: Mapping[str, Sequence[int]],
    hints: Mapping[str, Pairs],
    check: Check,
    config: Mapping[str, Any] | None = None,
    limit: int = 64,
) -> Patch:
    """Find the patch that makes `module` compute what the slim graph computes.

    Args:
        module: The original module, on any device; it isn't changed.
        shapes: Slim name to shape, of every parameter and buffer.
        dropped: Path of a stack to the positions of the layers that leave it.
        hints: Original module path to the (old, new) sizes of tensors computed in its scope.
        check: Tells whether a resized module is right. It always gets the same object, whose
            parameters and buffers are on the meta device at first; it may fill them. An
            exception out of the module counts as no.
        config: Edits of the module's ``config`` that go with the dropped layers.
        limit: How often to run the check at most, before the patch is trimmed.

    Raises:
        EmitError: No choice of attributes passes the check, or a tensor cannot be resized.
    """
    renumbered = _layer_indices(module, dropped)
    resized = skeleton(module)
    layers = Patch(dropped=dict(dropped), config=dict(config or {}))
    apply_patch(resized, layers)
    wanted = _new_shapes(resized, shapes)
    scopes = _scopes(module, resized, dropped, hints)
    choices = list(_choices(resized, wanted, scopes))
    fixed = merge([renumbered, *(choice.certain for choice in choices)])
    patch = replace(layers, shapes=wanted, attributes=fixed)
    apply_patch(resized, Patch(shapes=wanted, attributes=fixed))

    open_choices = [choice for choice in choices if len(choice.options) > 1]
    search = Trials(resized, open_choices, check)
    state, passed = best_first([len(c.options) for c in open_choices], search.evaluate, limit)
    if not passed:
        culprit, error = search.failure(state)
        raise EmitError(
            "No resized form of the module computes what the slim graph computes.",
            where=f"module '{culprit}'" if culprit else None,
            why=str(error or "its outputs differ under every choice of size attributes tried"),
            hint="use the exported graph of the slim program instead",
        )
    edits = search.trim(state)
    return replace(patch, attributes=merge([fixed, edits]))


def _layer_indices(
    module: nn.Module, dropped: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Renumber what counts layers: attributes that equal the child's index in every child."""
    edits: dict[str, dict[str, Any]] = {}
    for stack, gone in dropped.items():
        places: dict[tuple[str, str], dict[int, int]] = {}
        for i, child in enumerate(module.get_submodule(stack)._modules.values()):
            if child is None:
                continue
            for path, inner in child.named_modules():
                for name, value in vars(inner).items():
                    if type(value) is int and INDEX.search(name):
                        places.setdefault((path, name), {})[i] = value
        for (path, name), values in places.items():
            if any(i != value for i, value in values.items()):
                continue
            for i in values:
                inner_path = f"{stack}.{i}.{path}" if path else f"{stack}.{i}"
                slim = slim_name(inner_path, dropped)
                if slim is not None:
                    new = i - sum(other < i for other in gone)
                    edits.setdefault(slim, {})[name] = new
    return edits


def _new_shapes(module: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors of `module` whose shapes change, under all of their names."""
    tensors = dict(named_tensors(module))
    for name in sorted(shapes.keys() - tensors.keys()):  # constants that are plain attributes
        owner, leaf = owner_of(module, name)
        value = getattr(owner, leaf, None)
        if isinstance(value, torch.Tensor):
            tensors[name] = value
    by_tensor = {id(tensors[name]): tuple(shapes[name]) for name in tensors if name in shapes}
    changed = {}
    for name, tensor in tensors.items():
        old, new = tuple(tensor.shape), by_tensor.get(id(tensor))
        if new is None or new == old:
            continue
        if len(new) != len(old) or any(n > o for n, o in zip(new, old, strict=True)):
            raise EmitError(
                "A tensor cannot be resized.", where=name, why=f"shape {old} cannot become {new}"
            )
        changed[name] = new
    return changed


def _scopes(
    module: nn.Module,
    resized: nn.Module,
    dropped: Mapping[str, Sequence[int]],
    hints: Mapping[str, Pairs],
) -> dict[str, list[tuple[int, int]]]:
    """Slim module path to the size changes in its scope."""
    scopes = {path: list[tuple[int, int]]() for path, _ in resized.named_modules()}
    for path, pairs in hints.items():
        slim = slim_name(path, dropped)
        if slim in scopes:
            scopes[slim] += pairs
    for stack, gone in dropped.items():
        owner = slim_name(stack.rpartition(".")[0], dropped)
        if owner is not None:
            total = len(module.get_submodule(stack)._modules)
            scopes[owner].append((total, total - len(gone)))
    return scopes


def _choices(
    module: nn.Module,
    wanted: Mapping[str, Shape],
    scopes: Mapping[str, Pairs],
) -> Iterator[Choice]:
    """Yield one choice for every attribute at every place."""
    places: dict[tuple[str, str], dict[str, dict[str, Edits]]] = {}
    for path, inner in module.named_modules():
        own = {
            name: (tuple(tensor.shape), wanted.get(f"{path}.{name}" if path else name))
            for name, tensor in [*inner._parameters.items(), *inner._buffers.items()]
            if tensor is not None
        }
        shapes = {name: (old, old if new is None else new) for name, (old, new) in own.items()}
        pairs = [pair for old, new in shapes.values() for pair in zip(old, new, strict=True)]
        pairs = list(dict.fromkeys([*pairs, *scopes[path]]))
        if all(old == new for old, new in pairs):
            continue
        known = layer_sizes(inner, shapes, pairs)
        for label, options in known.options.items():
            # These are exact: there is no keeping the old value.
            numbered = {f"{label} {i}": option for i, option in enumerate(options)}
            places.setdefault((place(path), label), {})[path] = numbered
        for name, value in vars(inner).items():
            if name not in known.names and not INDEX.search(name):
                derived = not type(inner).__module__.startswith("torch.nn")
                labelled = _by_value(name, value, pairs, derived)
                if labelled:
                    places.setdefault((place(path), name), {})[path] = labelled
    for modules in places.values():
        yield _choice(modules)


def _choice(modules: Mapping[str, Mapping[str, Edits]]) -> Choice:
    """Let the modules of one place choose together, by label; the commonest first label leads."""
    certain = {
        path: next(iter(options.values())) for path, options in modules.items() if len(options) == 1
    }
    unsure = {path: options for path, options in modules.items() if len(options) > 1}
    firsts = Counter(next(iter(options)) for options in unsure.values())
    labels = [label for label, _ in firsts.most_common()]
    labels += [label for options in unsure.values() for label in options]
    return Choice(
        tuple(
            {path: options.get(label, {}) for path, options in unsure.items()}
            for label in dict.fromkeys(labels)
        ),
        certain,
    )


def _by_value(name: str, value: object, pairs: Pairs, derived: bool) -> dict[str, Edits]:
    """The options of an attribute that may be a size, by label, likeliest first.

    An integer that is the quotient of two sizes (query heads per group) or a size that did not
    change everywhere has reason to stay, so staying comes first then. With `derived` it may also
    be a divisor that has changed with a size.
    """
    if isinstance(value, (list, tuple)):
        return _by_values(name, value, pairs)
    if type(value) is not int or value < 2:
        return {}
    direct = [new for old, new in pairs if old == value != new]
    stays = (value, value) in pairs or any(
        a != b and a == value * c and b == value * d and c != d for a, b in pairs for c, d in pairs
    )
    scaled = [
        new * value // old
        for old, new in pairs
        if derived and old != value and old % value == 0 and (new * value) % old == 0
    ]
    news = [new for new in dict.fromkeys([*direct, *scaled]) if new not in (value, 0)]
    if not news:
        return {}
    edits: dict[str, Edits] = {f"size {i}": {name: new} for i, new in enumerate(news)}
    if len(direct) == 1 and not stays:
        first, *rest = edits
        return {first: edits[first], "keep": {}, **{label: edits[label] for label in rest}}
    return {"keep": {}, **edits}


def _by_values(name: str, value: Sequence[object], pairs: Pairs) -> dict[str, Edits]:
    """The options of a list or tuple of sizes (split sizes, a shape): changed together or not."""
    if not 0 < len(value) <= LONGEST or any(type(item) is not int for item in value):
        return {}
    first_new = {old: new for old, new in reversed(pairs) if old != new and old > 1}
    resized = [first_new.get(item, item) if isinstance(item, int) else item for item in value]
    if resized == list(value):
        return {}
    return {"size 0": {name: resized}, "keep": {}}
