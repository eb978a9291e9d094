"""A pass for onnx-ir: prunes a model in memory, wherever passes of onnx-ir are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass

from graphprune.errors import LoadError
from graphprune.frontends.onnx.load import adopt
from graphprune.frontends.onnx.read import adopt_onnx
from graphprune.integrations.goal import Choice, carry_out, settle

_PRUNED_BY = "graphprune.pruned_by"


class PruneOnnx(ir.passes.InPlacePass):
    """Prunes an ``onnx_ir.Model``.

    1. Needs a valid model of a supported opset, whose initialisers all have data.
    2. Functions are inlined and constants become initialisers, as when a file is read.
    3. Units are chosen, weights and sizes cut, and the result is compared with the masked model.
    4. The model gets the slim graph in place of its own. When anything before that fails, it is
       as it was. Weights are cut when they are read, and the plan is in ``metadata_props``.

    Not touched: names of inputs and outputs, quantised weights, what `graphprune inspect` calls
    frozen. A pass object prunes a model once, so that a PassManager may repeat its passes.

    Args:
        recipe: a plan, a recipe, its plain data, or the path of a recipe in YAML.
        shapes: input name to an example shape, where the usual ones don't fit the model.
        check: compare the result with the masked model; needs ONNX Runtime.
        **settings: keys of a recipe, such as ``remove={"ffn": 0.25}``; they win over `recipe`'s.

    Raises:
        RecipeError: the recipe can't be understood.
    """

    def __init__(
        self,
        recipe: Choice | None = None,
        *,
        shapes: Mapping[str, Sequence[int]] | None = None,
        check: bool = True,
        **settings: object,
    ) -> None:
        self.goal = settle(recipe, settings)
        self.shapes = shapes
        self.check = check

    def requires(self, model: ir.Model) -> None:
        """See the class, point 1.

        Raises:
            PreconditionError: it isn't so.
        """
        try:
            adopt_onnx(model)
        except LoadError as error:
            raise ir.passes.PreconditionError(str(error)) from error

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Prune the model.

        Raises:
            LoadError: no example input fits the model.
            PlanError: the goal can't be reached, or the plan was made for another model.
            VerifyError: the slim model doesn't equal the masked one.
        """
        if model.graph.meta.get(_PRUNED_BY) is self:
            return ir.passes.PassResult(model, modified=False)
        slim = carry_out(adopt(model, self.shapes), self.goal, check=self.check)
        if not slim.plan.kept_units:
            return ir.passes.PassResult(model, modified=False)
        pruned = slim.rewritten()
        model.graph = pruned.graph
        model.graph.meta[_PRUNED_BY] = self
        model.functions.clear()
        model.metadata_props.update(pruned.metadata_props)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Check the result in full.

        Raises:
            PostconditionError: the checker refuses it.
        """
        try:
            CheckerPass(full_check=True)(model.clone())  # it changes the order of initialisers
        except Exception as error:  # the checker has several
            reason = str(error.__cause__ or error).strip()
            raise ir.passes.PostconditionError(f"the model is not valid: {reason}") from error
