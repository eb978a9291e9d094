"""Running single nodes of a graph on a sample's values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ir.torch.interpreter import GraphRunner
from graphprune.ir.torch.program import Program
from graphprune.oracle.masked import Masking
from graphprune.oracle.masked_ops import Masks
from graphprune.plan.plan import Selection, stand_ins
from graphprune.streaming.torch.attention import ATTENTION, Attention
from graphprune.streaming.torch.schedule import TorchSchedule

Values = dict[fx.Node, Any]
_EMBEDDING = torch.ops.aten.embedding.default


class Runner(GraphRunner):
    """Runs nodes one by one, with all floating numbers in one dtype.

    A weight is read where it is used, and converted once per segment. Rows of an embedding and
    matrices of chosen experts are taken before they are converted.
    """

    def __init__(
        self,
        program: Program,
        schedule: TorchSchedule,
        dtype: torch.dtype,
        weight: Callable[[str], Tensor],
        stand_ins: Mapping[str, str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """A runner.

        Args:
            program: gives the graph.
            schedule: what is to run.
            dtype: the floating dtype of everything.
            weight: gives a weight by its name, as it is stored.
            stand_ins: value name to the name of an earlier value that takes its place.
            device: of everything but the weights as they are stored; None leaves all where it is.
        """
        super().__init__(
            program.exported, program.weights, dtype, program.aliases, stand_ins, device=device
        )
        self.schedule = schedule
        self._weight = weight
        self._opened: dict[str, Tensor] = {}
        self._converted: dict[str, Tensor] = {}
        self._needed = schedule.needed
        self._attention = Attention()

    def forget(self) -> None:
        """Let go of weights, which may have changed."""
        self._opened.clear()
        self._converted.clear()

    def given(self, leaves: list[Any]) -> Values:
        """The values of the user inputs that are needed."""
        pairs = zip(self.schedule.inputs, leaves, strict=True)
        return {n: self._cast(leaf) for n, leaf in pairs if n in self.schedule.needed}

    def execute(self, node: fx.Node, values: Values, sizes: Hashable = None) -> Any:
        """The value of `node`, from those of its operands.

        Args:
            node: the node.
            values: of its operands.
            sizes: equal for samples whose dynamic dimensions are equal.
        """
        del sizes
        self.env = values
        return self.run_node(node)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """`args` with values in place of nodes; weights are read now."""

        def load(node: fx.Node) -> Any:
            name = self.schedule.weights.get(node)
            if name is not None:
                return self._read(node, name)
            if node in self.schedule.derived:
                return self._call(node, node.target)  # type: ignore[arg-type]
            return self.env[node]

        return fx.map_arg(args, load)

    def _read(self, node: fx.Node, name: str) -> Any:
        del node
        name = self.aliases.get(name, name)
        found = self._converted.get(name)
        if found is None:
            found = self._converted[name] = self._cast(self.stored(name))
        return found

    def stored(self, name: str) -> Tensor:
        """A weight as it is stored, treated if it has been."""
        name = self.aliases.get(name, name)
        if name in self._opened:
            return self._opened[name]
        if name in self._known:
            found = self._opened[name] = self._weight(name).detach()
            return found
        constant: Tensor = self.exported.constants[name]
        return constant.detach()

    def _call(self, node: fx.Node, target: torch._ops.OpOverload[..., Any]) -> Any:
        site = self.schedule.experts.get(node)
        if site is not None:
            named = self.schedule.named
            x, chosen = self.env[named[site.operand]], self.env[named[site.chosen]]  # type: ignore[index]
            product = site.layout.product  # type: ignore[attr-defined]
            return product(self.stored(site.parameter), chosen, x)
        table = self.schedule.weights.get(node.args[0]) if target is _EMBEDDING else None  # type: ignore[arg-type]
        if table is not None:
            places, weight = self.env[node.args[1]], self.stored(table)  # type: ignore[index]
            return self._cast(_EMBEDDING(weight, places.to(weight.device)))
        return super()._call(node, target)

    def _compute(
        self,
        target: torch._ops.OpOverload[..., Any],
        arguments: dict[str, Any],
        nodes: Mapping[str, Any],
    ) -> Any:
        if target is ATTENTION and (found := self._attention.attend(arguments)) is not None:
            return found
        return super()._compute(target, arguments, nodes)


class MaskedRunner(Masking, Runner):
    """Runs nodes as if a plan had been applied, at full size."""

    def __init__(
        self,
        program: Program,
        schedule: TorchSchedule,
        dtype: torch.dtype,
        weight: Callable[[str], Tensor],
        selection: Selection,
        device: torch.device | None = None,
    ) -> None:
        """A runner; see `Runner` and `graphprune.oracle.masked.MaskedInterpreter`."""
        super().__init__(program, schedule, dtype, weight, stand_ins(selection), device)
        self.begin(program, selection)
        self._masks: dict[Hashable, Masks] = {}

    def execute(self, node: fx.Node, values: Values, sizes: Hashable = None) -> Any:
        """The value of `node`, from those of its operands."""
        self.masks = self._masks.setdefault(sizes, Masks(self.keep))
        return super().execute(node, values)
