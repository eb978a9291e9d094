"""The rows of docs/results.md: what is measured, and what the original code reaches.

Everything here is data; `_results_run` computes a row, `_results_table` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        table: the table that it is in.
        target: what is removed.
        method: how.
        options: what `_results_run` needs.
        original: what the original code reaches on this protocol, if it has been measured.
    """

    table: str
    target: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    original: float | None = None

    @property
    def key(self) -> str:
        """Under which the result is kept."""
        return f"{self.table}/{self.target}/{self.method}"


METRICS = ("perplexity", "spearman", "cosine", "top1", "loss", "rescaled")
"""What rows may have been measured by."""

MASKED = "masks"
WIDTH = "width"
DEPTH = "depth"

_ORIGINAL = {
    ("50 %", "magnitude"): 502.9,
    ("50 %", "wanda"): 50.06,
    ("50 %", "sparsegpt"): 39.23,
    ("60 %", "wanda"): 116.4,
    ("60 %", "sparsegpt"): 62.24,
    ("60 %", "alps"): 44.76,
    ("70 %", "sparsegpt"): 108.1,
    ("70 %", "alps"): 66.47,
    ("2:4", "sparsegpt"): 56.24,
    ("ffn -25 %", "obs"): 32.76,
    ("ffn -25 %", "flap"): 38.24,
    ("ffn -25 %", "minitron"): 39.47,
    ("ffn -25 %", "element1"): 44.80,
    ("ffn -25 %", "element-mix"): 44.77,
    ("ffn -50 %", "obs"): 45.52,
    ("ffn -50 %", "flap"): 81.7,
    ("ffn -50 %", "taylor"): 129.5,
    ("kv 3 to 2", "flap"): 43.62,
    ("kv 3 to 2", "taylor"): 61.1,
    ("20 % of layers 4-27", "flap"): 44.83,
    ("20 % of layers 4-27", "taylor"): 68.2,
    ("-2 layers", "block-influence"): 34.40,
    ("-4 layers", "block-influence"): 43.43,
}

PATTERNS = ("50 %", "60 %", "70 %", "2:4")
STRIPS = "50 % of strips"
SOLVERS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
WIDTHS: Mapping[str, Mapping[str, Any]] = {
    "ffn -25 %": {"remove": {"ffn": 0.25}},
    "ffn -50 %": {"remove": {"ffn": 0.5}},
    "kv 3 to 2": {"shape": {"kv_heads": 2}},
    "20 % of layers 4-27": {
        "shape": {"ffn": 1194, "kv_heads": 2},
        "exclude": [f"model.layers.{i}.*" for i in (0, 1, 2, 3, 28, 29)],
    },
}
SCORES = ("magnitude", "taylor", "element1", "element-mix", "minitron", "flap", "obs")
SEARCHED = 8  # windows: a search for a layer runs half of the model once for every layer
DEPTHS = ("block-influence", "loss-greedy", "span-influence")


def smollm2_rows() -> list[Row]:
    """The rows of the language model, in the order in which they are worth knowing."""
    rows = [Row("dense", "", "dense")]
    for target in PATTERNS:
        for method in SOLVERS:
            rows.append(_row(MASKED, target, method, pattern=target, solver=method))
    rows.append(_row(MASKED, "2:4", "ria + permute", pattern="2:4", solver="ria", permute=True))
    for target in ("60 %", "70 %"):
        for method in ("sparsegpt", "alps"):
            both = f"{method} + reference"
            rows.append(_row(MASKED, target, both, pattern=target, solver=method, reference=True))
    for method in SOLVERS:
        rows.append(_row(MASKED, "70 %", f"{method} + owl", pattern="70 %", solver=method,
                         budget="owl"))  # fmt: skip
    for method in ("wanda", "sparsegpt", "alps"):
        rows.append(_row(MASKED, STRIPS, method, pattern=STRIPS, solver=method))
    for target in WIDTHS:
        for score in SCORES:
            plain = "bias" if score == "flap" else "none"
            rows.append(_row(WIDTH, target, score, score=score, repair=plain))
            both = f"{score} + reconstruct"
            rows.append(_row(WIDTH, target, both, score=score, repair="reconstruct"))
    for count in (2, 4):
        for score in DEPTHS:
            rows.append(_row(DEPTH, f"-{count} layers", score, score=score, count=count))
        both = "block-influence + reconstruct"
        rows.append(_row(DEPTH, f"-{count} layers", both, score="block-influence", count=count,
                         repair=True))  # fmt: skip
    return rows


TASK_WIDTHS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "minilm": ("ffn -25 %", {"ffn": 0.25}),
    "whisper": ("ffn -25 %", {"ffn": 0.25}),
    "efflite0": ("expansions -25 %", {"_blocks.*._expand_conv.weight:0": 0.25}),
    "mgm": ("ffn -25 %", {"ffn": 0.25}),
}
LAYERS = {"minilm": 6, "whisper": 6, "efflite0": 16, "mgm": 8}
RECOVERED: Mapping[str, Mapping[str, Any]] = {
    "minilm": {"epochs": 3, "batch": 32, "lr": 3e-4},
    "efflite0": {"loss": "kd", "epochs": 3, "batch": 16, "lr": 2e-5},
}
"""How what is left of a model is trained: MiniLM on the embeddings of the dense model, EfficientNet
on its distribution over classes."""
TASK_SCORES = {
    "minilm": ("magnitude", "minitron", "flap", "obs"),
    "whisper": ("magnitude", "minitron", "flap", "obs"),
    "efflite0": ("magnitude", "flap", "obs"),
    "mgm": ("magnitude", "taylor", "element-mix", "minitron", "flap", "obs"),
}


def task_rows() -> list[Row]:
    """The rows of the other models; the options are the recipe."""
    rows = []
    for model, (target, remove) in TASK_WIDTHS.items():
        rows.append(Row(model, "", "dense"))
        for method in SOLVERS:
            sparsify = {"method": method, "sparsity": 0.5}
            rows.append(Row(model, "50 %", method, {"sparsify": sparsify}))
        for score in TASK_SCORES[model]:
            # EfficientNet's convolutions have no bias, and no configuration to ask for one.
            plain = "bias" if score == "flap" and model != "efflite0" else "none"
            for repair, method in ((plain, score), ("reconstruct", f"{score} + reconstruct")):
                recipe = {"remove": remove, "score": score, "repair": repair}
                rows.append(Row(model, target, method, recipe))
        fewer = {"remove": {"layers": 1 / LAYERS[model]}, "score": "block-influence"}
        rows.append(Row(model, "-1 layer of each stack", "block-influence", fewer))
        if model in RECOVERED:
            recipe = {"remove": remove, "score": "obs", "recover": RECOVERED[model]}
            rows.append(Row(model, target, "obs + recover", recipe))
        if model == "minilm":
            fewer = {**fewer, "recover": RECOVERED[model]}
            name = "block-influence + recover"
            rows.append(Row(model, "-1 layer of each stack", name, fewer))
    return rows


def _row(table: str, target: str, method: str, **options: Any) -> Row:
    return Row(table, target, method, options, _ORIGINAL.get((target, method)))
