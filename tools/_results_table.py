"""docs/results.md from the measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from _results_data import DATA, TITLES, data_lines, data_rows, data_text
from _results_doubts import doubts
from _results_rows import (
    DEPTH,
    MASKED,
    METRICS,
    SEARCHED,
    TASK_WIDTHS,
    WIDTH,
    Row,
    smollm2_rows,
    task_rows,
)
from _results_training import training_rows, training_sections
from _tables import table

HEAD = """# Results

<!-- tools/results -->

SmolLM2-135M-Instruct in float32 on WikiText-2 (raw text, tokenised once without special tokens,
non-overlapping windows of 512 tokens): calibration on the first 64 windows of the validation text,
perplexity, the exponential of the mean loss of a token, on the first 64 of the test text. No
training. *Original* is the code that its authors published, where it was run on this protocol.
*Passes* is processor time in units of one evaluation of 64 windows on the same machine.
"""
SECTIONS = {
    MASKED: (
        "Masks",
        "All weights of the decoder layers; each reads what the layers before it, pruned, compute. "
        "*Error* is the mean relative error of a weight's output. *Reference*: the dense model "
        "runs along, and later layers make up for what earlier ones lost. "
        "OWL was made for *wanda*: here *sparsegpt* loses by it, in error as in perplexity. "
        "Rounding alone moves *sparsegpt*: at 50 %, batches of 1, 2, 4 and 8 windows gave 39.68, "
        "39.53, 39.69 and 39.98 on one machine, batches of 1 gave 39.49 on another, and the plain "
        "implementation of `tools/bench oneshot` gave 39.41.",
        ("mask", "method", "perplexity", "original", "error", "passes"),
    ),
    WIDTH: (
        "Width",
        "Equal counts in every layer. `reconstruct` refits what reads the pruned axes; *flap* adds "
        "biases.",
        ("removed", "method", "perplexity", "original", "parameters", "passes"),
    ),
    DEPTH: (
        "Depth",
        f"*loss-greedy* searches on the first {SEARCHED} windows.",
        ("removed", "method", "perplexity", "original", "layers", "passes"),
    ),
}

TASKS = {
    "minilm": (
        "all-MiniLM-L6-v2",
        "*Spearman*, times 100, on the 1,379 pairs of STS-B's test set (mean pooling, cosine); "
        "*cosine*, times 100, between these sentences' embeddings and those of the dense model: "
        "people may agree with a pruned model more, but it isn't nearer. Calibration on the first "
        "1,024 sentences of its development set; with *recover* on 2,000, whose embeddings by the "
        "dense model are learnt in three passes.",
    ),
    "whisper": (
        "Whisper-base",
        "One recording is there, of eleven seconds. Calibration on its first half, after silences "
        "of eight lengths, which is one sample eight times over: held-out ones can't tell a fit of "
        "its noise, and the decoder's gaps, of fewer tokens than inputs, stay open; *perplexity* "
        "of the dense model's transcript of its second half, 18 tokens.",
    ),
    "efflite0": (
        "EfficientNet-Lite0",
        "200 photos of ImageNet, one of a class: calibration on every other one, *top-1* in "
        "percent and mean *loss* on the rest; *rescaled loss*: after logits are multiplied by the "
        "number that makes it least. *Expansions* are the wide channels of the blocks. Least "
        "squares shrinks what it can't explain: `reconstruct` ranks classes better, by smaller "
        "logits.",
    ),
    "mgm": (
        "MGM",
        "A GPT-2 over bacterial genera. Sequences of 64 tokens that the dense model has made: "
        "calibration on 96, *perplexity* on 96 others.",
    ),
}
NAMES = {
    "perplexity": "perplexity",
    "spearman": "Spearman",
    "cosine": "cosine",
    "top1": "top-1",
    "loss": "loss",
    "rescaled": "rescaled loss",
}


def all_rows() -> list[Row]:
    """Every row that can be measured, in the order in which the document shows them."""
    return [*smollm2_rows(), *data_rows(), *training_rows(), *task_rows()]


def page(
    rows: Iterable[Row],
    found: Mapping[str, Mapping[str, Any]],
    kernels: Mapping[str, Mapping[str, Any]],
) -> str:
    """The document.

    Args:
        rows: in the order in which they are shown.
        found: what was measured, by the key of a row.
        kernels: what `tools/bench kernels` has measured, by part.
    """
    rows = list(rows)
    parts = [HEAD]
    dense = found.get("dense//dense")
    if dense is not None:
        parts.append(f"Dense: **{dense['perplexity']:.2f}**.\n")
    for kind, (title, text, titles) in SECTIONS.items():
        lines = [
            _line(row, found[row.key]) for row in rows if row.table == kind and row.key in found
        ]
        if lines:
            parts += [f"## {title}\n", *([text + "\n"] if text else []), table(titles, lines)]
            parts += doubts([row for row in rows if row.table == kind], found)
    data = data_lines([row for row in rows if row.table == DATA], found)
    if data:
        parts += ["## Calibration data\n", data_text(found) + "\n", table(TITLES, data)]
    parts += training_sections(rows, found, table)
    rest = [row for row in rows if row.table in TASK_WIDTHS and row.key in found]
    if rest:
        parts.append(
            "## Other models\n\nThe same passes, by `graphprune compile` and measured from the "
            "files that it wrote. No original code was run.\n"
        )
    for model, (title, text) in TASKS.items():
        own = [row for row in rest if row.table == model]
        if own:
            shown = [m for m in METRICS if m in found[own[0].key]]
            titles = ("removed", "method", *(NAMES[m] for m in shown), "parameters")
            lines = [_task_line(row, found[row.key], shown) for row in own]
            parts += [f"### {title}\n", text + "\n", table(titles, lines), *doubts(own, found)]
    return "\n".join([*parts, *_kernels(kernels)])


KERNELS = {
    "cpu": "A product in PyTorch, 4096 x 4096, the weight from memory.",
    "onnx": "An MLP of 4096 x 4096 weights in ONNX Runtime, from a packed file.",
    "decode": "A token of SmolLM2 at 60 % by SparseGPT: packed against dense with zeros.",
    "gpu": "A product on a GPU, under CUDA graphs.",
}


def _kernels(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The section on sparse layers, from what `tools/bench kernels` has written."""
    if not found:
        return []
    parts = [
        "## Sparse layers\n\nBy `tools/bench kernels`, one thread: *ratio* is the median time of "
        "the dense layer over that of the packed one, in turns in one run. *Bytes*: of the file, "
        "packed over dense.\n"
    ]
    for part, text in KERNELS.items():
        if part not in found:
            continue
        facts = found[part]
        names = list(dict.fromkeys(n for row in facts["rows"] for n in row if n != "bar"))
        lines = [tuple(_shown(row.get(name)) for name in names) for row in facts["rows"]]
        titles = tuple(name.replace("_", " ") for name in names)
        parts += [f"{text} {facts['device']}, {facts['date']}.\n", table(titles, lines)]
    if "gpu" not in found:
        parts.append("There was no GPU to measure on.\n")
    return parts


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _task_line(row: Row, facts: Mapping[str, Any], shown: Iterable[str]) -> tuple[str, ...]:
    count = facts.get("parameters")
    return (
        row.target,
        row.method,
        *(f"{facts[m]:.{3 if 'loss' in NAMES[m] else 2}f}" if m in facts else "" for m in shown),
        "" if count is None else f"{count / 1e6:.2f} M",
    )


def _line(row: Row, facts: Mapping[str, Any]) -> tuple[str, ...]:
    passes = facts["seconds"] / facts["pass_seconds"] if facts.get("pass_seconds") else None
    error = facts.get("error")
    middle = {
        MASKED: f"{error:.4f}" if error is not None else "",
        WIDTH: f"{facts['parameters'] / 1e6:.1f} M",
        DEPTH: ", ".join(map(str, facts.get("removed", ()))),
    }[row.table]
    return (
        row.target,
        row.method,
        f"{facts['perplexity']:.2f}"
        if facts["perplexity"] < 1000
        else f"{facts['perplexity']:.3g}",
        "" if row.original is None else f"{row.original:.2f}",
        middle,
        "" if passes is None else f"{passes:.1f}",
    )
