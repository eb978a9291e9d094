"""An Olive pass: prunes Hugging Face and ONNX models inside an Olive workflow.

Olive knows the passes that its package configuration lists, and a configuration of one's own
replaces that list: `package_config` gives Olive's own list with the pass of this module added.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from graphprune.analysis.structure import Structure
from graphprune.errors import LoadError
from graphprune.files import write_text
from graphprune.frontends.onnx.load import load_onnx
from graphprune.integrations.goal import carry_out, settle
from graphprune.ir.onnx.external import data_files
from graphprune.pipeline.compiler import compile
from graphprune.plan.kept import rows_of
from graphprune.recipe.recipe import Recipe
from graphprune.rewrite.slim_onnx import SlimOnnx

try:
    from olive.common.hf.io_config.io_resolver import get_aliases, resolve_alias
    from olive.model import HfModelHandler, ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
    from olive.passes.pytorch.common import inherit_hf_from_hf
except ImportError as error:
    raise LoadError(
        "Olive can't be imported", why=str(error), hint="pip install 'graphprune[olive]'"
    ) from error

logger = logging.getLogger(__name__)

# What a role of structures makes of the sizes that a model's attributes tell, by Olive's names.
_SIZES = {
    "kv_heads": ("num_attention_heads", "num_kv_heads"),
    "query_heads": ("num_attention_heads",),
    "qk_dim": ("head_dim",),
    "hidden": ("hidden_size",),
    "ffn": ("intermediate_size",),
}


class GraphPrune(Pass):  # type: ignore[misc]  # Olive may be absent
    """Prunes a Hugging Face model (to a checkpoint) or an ONNX model (to an ONNX file).

    The one parameter of its own, ``recipe``, holds a recipe or the path of one in YAML; what it
    says of formats doesn't count. The result has been compared with the masked model.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        recipe = PassConfigParam(
            type_=dict | str,
            required=True,
            description="What to remove: a graphprune recipe, or the path of one in YAML.",
        )
        return {"recipe": recipe}

    def _run_for_config(
        self, model: Any, config: Any, output_model_path: str
    ) -> HfModelHandler | ONNXModelHandler:
        recipe = settle(config.recipe, {})
        assert isinstance(recipe, Recipe)
        if isinstance(model, HfModelHandler):
            return _checkpoint(model, recipe, output_model_path)
        if isinstance(model, ONNXModelHandler):
            return _onnx(model, recipe, output_model_path)
        raise LoadError(
            "GraphPrune takes Hugging Face and ONNX models",
            where=type(model).__name__,
            hint="put it before the pass that makes this kind of model",
        )


def _checkpoint(model: HfModelHandler, recipe: Recipe, path: str) -> HfModelHandler:
    if model.adapter_path:
        raise LoadError(
            "a model with an adapter can't be pruned",
            where=str(model.adapter_path),
            hint="merge the adapter into the model first",
        )
    report = compile(model.model_name_or_path, recipe, path, ("hf",), overwrite=True)
    for note in report.notes:
        logger.warning(note)
    loading = model.load_kwargs.model_dump(exclude_unset=True) if model.load_kwargs else {}
    if not report.native:
        loading["trust_remote_code"] = True
    return inherit_hf_from_hf(model, path, load_kwargs=loading or None)


def _onnx(model: ONNXModelHandler, recipe: Recipe, path: str) -> ONNXModelHandler:
    source = Path(model.model_path)
    target = Path(resolve_onnx_path(path, source.name))
    slim = carry_out(load_onnx(source), recipe, check=True)
    slim.save(target)
    attributes = slim_attributes(model.model_attributes or {}, slim)
    if not data_files(target):
        return ONNXModelHandler(str(target), model_attributes=attributes)
    # Olive takes a file name for a path where the working directory has a file of that name.
    alone = len(list(target.parent.glob("*.onnx"))) == 1
    name = None if alone else target.name
    return ONNXModelHandler(str(target.parent), name, model_attributes=attributes)


def slim_attributes(attributes: Mapping[str, Any], slim: SlimOnnx) -> dict[str, Any]:
    """A model's attributes with the sizes that later passes read put right.

    Args:
        attributes: the dense model's: its Hugging Face configuration, as Olive carries it along.
        slim: the slim model.

    Returns:
        All of them. Where layers differ there is no right number: the old one stays then, with a
        warning, since the graph says what every layer has.
    """
    result = dict(attributes)
    names = SimpleNamespace(**attributes)
    hidden, heads, layers = (
        resolve_alias(names, name) for name in ("hidden_size", "num_attention_heads", "num_layers")
    )
    if hidden and heads:
        result.setdefault("head_dim", hidden // heads)  # it would be computed from the new ones
    for role, concerned in _SIZES.items():
        sizes = [(s.size, _kept(slim, s)) for s in slim.program.structures if s.role == role]
        if all(size == kept for size, kept in sizes):
            continue
        alike = len(set(sizes)) == 1 and len(sizes) == (1 if role == "hidden" else layers)
        size, kept = sizes[0]
        for key in (key for name in concerned for key in (*get_aliases().get(name, ()), name)):
            value = result.get(key)
            if not isinstance(value, int):
                continue
            if alike and value % size == 0:
                result[key] = value // size * kept
            else:
                logger.warning("%s stays %s, although the layers' %s differ", key, value, role)
    return result


def _kept(slim: SlimOnnx, structure: Structure) -> int:
    units = slim.plan.kept_units.get(structure.name)
    return structure.size if units is None else len(rows_of(units)[0])


def package_config(path: str | Path | None = None) -> dict[str, Any]:
    """Olive's package configuration with `GraphPrune` added.

    Args:
        path: where to write it as JSON too, for ``olive run --package-config``.

    Returns:
        What ``olive.run(config, package_config=...)`` takes.

    Raises:
        EmitError: it can't be written.
    """
    default = Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(default)
    config["passes"][GraphPrune.__name__] = {
        "module_path": f"{__name__}.{GraphPrune.__name__}",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    }
    if path is not None:
        write_text(Path(path), json.dumps(config, indent=1) + "\n")
    return config
