"""Exporters of transformers that prune on the way.

Every exporter of ``transformers.exporters`` begins with the same trace by ``torch.export``. A
pruning exporter cuts the traced program, so that whatever the format is, what follows (translation,
fusions, quantisation of the converted model) meets the small model. The module is not changed.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from graphprune.errors import LoadError, RecipeError
from graphprune.integrations.exported_program import prune
from graphprune.integrations.goal import Choice, settle

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers.exporters.exporter_dynamo import DynamoExporter


def pruning_exporter(
    format: str = "onnx",
    recipe: Choice | None = None,
    *,
    check: bool = True,
    **settings: object,
) -> DynamoExporter:
    """An exporter of transformers that prunes what it exports.

    Its ``export(model, inputs, config)`` and ``export_for_generation`` are those of the exporter of
    that format. Of a model that is exported in several components, each is pruned by the same
    recipe; a plan fits one of them only.

    Args:
        format: "onnx", "dynamo", or another one that transformers knows or has been told of.
        recipe: a plan, a recipe, its plain data, or the path of a recipe in YAML.
        check: compare each pruned program with the masked model on random inputs.
        **settings: keys of a recipe, such as ``remove={"ffn": 0.25}``; they win over `recipe`'s.

    Raises:
        LoadError: transformers is too old, has no such format, or lacks a package for it.
        RecipeError: the recipe can't be understood.
    """
    goal = settle(recipe, settings)
    try:
        from transformers.exporters.auto import get_exporter_class
        from transformers.exporters.exporter_dynamo import DynamoExporter
    except ImportError as error:
        raise LoadError(
            "this transformers has no exporters",
            why=f"it is version {version('transformers')}",
            hint="pip install 'transformers>=5.24', or prune with gp.compile and export the result",
        ) from error
    try:
        base = get_exporter_class(format)
    except (ImportError, ValueError) as error:
        raise LoadError("transformers can't export that", where=format, why=str(error)) from error
    if not issubclass(base, DynamoExporter):
        raise LoadError(
            "only exporters that trace with torch.export can prune",
            where=base.__name__,
            hint="prune with gp.compile and export the result",
        )

    class Traced(DynamoExporter):
        """The trace that the exporter of any format begins with, pruned."""

        def export_program(
            self, model: Any, sample_inputs: MutableMapping[str, Any], config: Any
        ) -> tuple[ExportedProgram, Any]:
            quantizer = config.quantizer
            if quantizer is not None and quantizer.quantizes_fx_graph:
                raise RecipeError(
                    "a graph can't be pruned once it is quantised",
                    where=type(quantizer).__name__,
                    hint="quantise the converted model, or prune the module and export that",
                )
            exported, metadata = super().export_program(model, sample_inputs, config)
            return prune(exported, goal, check=check), metadata

    # Method resolution puts `Traced` between the exporter of the format and the plain trace.
    bases = (Traced,) if base is DynamoExporter else (base, Traced)
    made: DynamoExporter = type(f"Pruning{base.__name__}", bases, {})()
    return made
