"""Which block of a model is trained on which value of the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphprune.analysis.structure import Block
from graphprune.axes import Atom, atoms, indices, touched
from graphprune.axes.expr import IntArray
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Selection, stand_ins


@dataclass(frozen=True)
class Pair:
    """A block, and what it is to compute. A slim graph's values have the names of the dense ones.

    Attributes:
        path: of the block in the dense model, "model.layers.3".
        entry: name of the value that it reads.
        exit: name of the value that it computes.
        target: name of the dense model's value that is wanted there.
        kept: dimension of the target to the indices that a plan leaves of it.
        features: the dimensions of the target that make up one token.
    """

    path: str
    entry: str
    exit: str
    target: str
    kept: Mapping[int, IntArray]
    features: tuple[int, ...]


def pairs_of(program: Program, selection: Selection) -> tuple[list[Pair], dict[str, str]]:
    """The blocks that a selection leaves of a program's stacks, and the others to the reasons.

    A block is to compute what it computes in the dense model, also behind layers that are removed:
    it makes up for them. If all layers after it are removed, it is to compute what the last one
    does.

    Raises:
        PlanError: the graph has no such blocks.
    """
    fixed = program.fixed_layers()
    moved = stand_ins(selection)
    found: list[Pair] = []
    for stack, (length, blocks) in program.stacks().items():
        removed = {b.index for b in selection.cuts.get(stack, ())}
        known = {b.index: b for b in blocks}
        for block in blocks:
            if block.index in removed:
                continue
            later = range(block.index + 1, length)
            target = known[length - 1] if removed.issuperset(later) and later else block
            pair = _pair(program, selection, moved, f"{stack}.{block.index}", block, target.exit)
            if pair.entry == pair.exit:
                fixed[pair.path] = "the plan leaves nothing of it"
            else:
                found.append(pair)
    if not found:
        reasons = dict.fromkeys(fixed.values())
        raise PlanError(
            "the graph has no residual blocks that could be matched",
            why="; ".join(list(reasons)[:3]) or "no modules repeat themselves in it",
            hint="leave block matching out",
        )
    return found, fixed


def _pair(
    program: Program,
    selection: Selection,
    moved: Mapping[str, str],
    path: str,
    block: Block,
    target: str,
) -> Pair:
    dims = program.typing.values[target][0]
    own = _atoms_of(program, block)
    features = tuple(i for i, e in enumerate(dims) if own & set(atoms(e)))
    keep = selection.keep
    return Pair(
        path,
        _resolved(block.entry, moved),
        _resolved(block.exit, moved),
        target,
        {i: indices(e, keep) for i, e in enumerate(dims) if touched(e, keep)},
        features or (len(dims) - 1,),
    )


def _atoms_of(program: Program, block: Block) -> set[Atom]:
    """The axes of a block's parameters; a token's features are among them."""
    dims = (d for name in block.parameters for d in program.typing.parameters[name])
    return {a for d in dims for a in atoms(d)}


def _resolved(name: str, moved: Mapping[str, str]) -> str:
    while name in moved:
        name = moved[name]
    return name
