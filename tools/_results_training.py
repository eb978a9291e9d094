"""The rows of docs/results.md on training: blocks matched, and weights recovered.

A row begins with what one-shot pruning leaves of a target (`STARTS`). `match` trains each block on
the 64 calibration windows alone; `recover` trains all weights on text that follows them. Each is
measured on the 64 windows of the other tables, and on twelve windows of three other kinds of text.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _results_data import NAMES, Domains
from _results_rows import WIDTHS, Row
from _results_run import LENGTH, WINDOWS, Bench, kept_losses

if TYPE_CHECKING:
    from torch import Tensor

MATCH = "match"
RECOVER = "recover"
TOKENS = 163_840

STARTS: Mapping[str, str] = {
    "60 %": "alps + reference",
    "70 %": "alps + reference",
    "2:4": "alps + reference",
    "ffn -50 %": "obs + reconstruct",
    "20 % of layers 4-27": "obs + reconstruct",
    "-4 layers": "block-influence + reconstruct",
}
MATCHED = tuple(STARTS)[:5]
MASKS = tuple(STARTS)[:3]
OTHERS = NAMES[1:]

ARMS: Mapping[str, Mapping[str, Any]] = {
    "full, ce": {"train": "full", "loss": "ce", "batch": 4},
    "full, kd": {"train": "full", "loss": "kd", "batch": 4},
    "lora, ce": {"train": "lora", "loss": "ce", "batch": 4},
    "lora, kd": {"train": "lora", "loss": "kd", "batch": 4},
    "llm-pruner": {"preset": "llm-pruner"},
}
"""What is trained, and towards what. The control of each is the dense model in the same way."""
CONTROLS = tuple(name for name in ARMS if not name.endswith("kd"))
"""The dense model learns nothing from itself: of an arm of ``kd`` it is the control as it is."""

TOGETHER = {"train": "full", "loss": "kd", "epochs": 3, "batch": 4, "lr": 3e-4}
"""All blocks together on the calibration windows, in as much time as `match` takes."""

MATCH_TEXT = (
    "`match` trains each residual block on what the dense block computes, on the same 64 windows "
    "(56 train, 8 judge), `recover` all weights together on the dense model's predictions for them "
    "(three passes, batches of 4, rate 3e-4); zeros and widths are held. The other texts are those "
    "of the table above, twelve windows each, as ratios to dense."
)
RECOVER_TEXT = (
    "`recover` on {tokens:,} tokens that follow the calibration windows (batches of 4 windows, one "
    "pass, seed 0; *llm-pruner* is its preset, of batches of 64), zeros held. *Over control*: "
    "perplexity over that of the dense model after the same training; of `kd`, over the dense "
    "model as it is. Training on one kind of text makes any model better on it, so that the other "
    "texts, as ratios to the dense model as it is, tell more."
)
TITLES = (
    "removed", "method", "perplexity", "over dense", "plays", "help", "code", "passes"
)  # fmt: skip
RECOVER_TITLES = (
    "removed", "trained", "perplexity", "over control", "plays", "help", "code", "minutes"
)  # fmt: skip


def training_rows() -> list[Row]:
    """In the order in which they are worth knowing."""
    rows = []
    for target in MATCHED:
        rows.append(Row(MATCH, target, STARTS[target]))
        rows += [Row(MATCH, target, f"{STARTS[target]} + {how}") for how in (MATCH, RECOVER)]
    rows += [Row(RECOVER, "", arm) for arm in CONTROLS]
    for target in STARTS:
        arms = (arm for arm in ARMS if arm != "llm-pruner" or target not in MASKS)
        rows += [Row(RECOVER, target, arm) for arm in arms]
    return rows


def training_sections(
    rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]], table: Callable[..., str]
) -> list[str]:
    """The parts of the document."""
    parts = []
    matched = _lines(MATCH, rows, found, _passes)
    if matched:
        parts += ["## Blocks matched\n", MATCH_TEXT + "\n", table(TITLES, matched)]
    recovered = _lines(RECOVER, rows, found, _minutes)
    if recovered:
        text = RECOVER_TEXT.format(tokens=TOKENS)
        parts += ["## Weights recovered\n", text + "\n", table(RECOVER_TITLES, recovered)]
    return parts


def _lines(
    kind: str,
    rows: Sequence[Row],
    found: Mapping[str, Mapping[str, Any]],
    last: Callable[[Mapping[str, Any]], str],
) -> list[tuple[str, ...]]:
    lines = []
    for row in rows:
        facts = found.get(row.key)
        if row.table != kind or facts is None:
            continue
        control = found.get(f"{RECOVER}//{row.method}")
        if kind == MATCH or row.method not in CONTROLS:
            control = found.get("dense//dense")
        over = f"{facts['perplexity'] / control['perplexity']:.2f}" if control else ""
        others = (f"{facts['ratios'][name]:.2f}" for name in OTHERS)
        shown = f"{facts['perplexity']:.2f}"
        lines.append((row.target or "nothing", row.method, shown, over, *others, last(facts)))
    return lines


def _passes(facts: Mapping[str, Any]) -> str:
    return f"{facts['seconds'] / facts['pass_seconds']:.1f}"


def _minutes(facts: Mapping[str, Any]) -> str:
    return f"{facts['seconds'] / 60:.0f}"


@dataclass(frozen=True)
class Start:
    """What one-shot pruning has left.

    Attributes:
        program: at full size, with the weights that fit.
        plan: what stays.
        masks: parameter to what of it stays.
        seconds: of processor time.
    """

    program: Any
    plan: Any
    masks: Mapping[str, Tensor]
    seconds: float


@dataclass
class Trainings:
    """The model, what is left of it, and the texts.

    Attributes:
        bench: the model with the text of the other tables.
        domains: the other texts.
        kept: where starts are kept for the next run; None keeps them while this one runs.
    """

    bench: Bench
    domains: Domains
    kept: Path | None = None
    known: dict[str, Start] = field(default_factory=dict)

    def measure(self, row: Row) -> dict[str, Any]:
        """Compute a row."""
        facts: dict[str, Any] = {}
        if row.table == RECOVER:
            options = {**ARMS[row.method], "tokens": TOKENS}
            module, facts["seconds"] = self._recovered(row, options, self.training)
        elif row.method.endswith(RECOVER):
            windows = self.bench.calibration
            module, facts["seconds"] = self._recovered(row, TOGETHER, windows)
        else:
            start = self._start(row.target)
            program, facts["seconds"] = start.program, start.seconds
            if row.method.endswith("match"):
                program, facts["seconds"] = self._matched(start)
            module = self._module(program, start.plan)
        return facts | self._quality(module)

    def _quality(self, module: Any) -> dict[str, Any]:
        from graphprune.quality.perplexity import parameters, perplexity

        begun = time.process_time()
        found = perplexity(module, self.bench.test)
        facts = {
            "perplexity": found.value,
            "losses": kept_losses(found.losses),
            "pass_seconds": round(time.process_time() - begun, 1),
            "parameters": parameters(module),
        }
        windows = {name: self.domains.windows[name] for name in OTHERS}
        values = {name: perplexity(module, texts).value for name, texts in windows.items()}
        return facts | {"ratios": {name: values[name] / self.dense[name] for name in OTHERS}}

    @cached_property
    def dense(self) -> dict[str, float]:
        """Perplexities of the dense model, on the texts beside WikiText-2."""
        from graphprune.quality.perplexity import perplexity

        module, windows = self.bench.program.module, self.domains.windows
        return {name: perplexity(module, windows[name]).value for name in OTHERS}

    def _module(self, program: Any, plan: Any) -> Any:
        from graphprune import apply

        return apply(program, plan).module

    def _matched(self, start: Start) -> tuple[Any, float]:
        from graphprune.passes.match import match

        begun = time.process_time()
        found = match(
            self.bench.program, start.program, self.bench.calibration, start.plan, masks=start.masks
        )
        return found.program, round(time.process_time() - begun, 1)

    def _recovered(self, row: Row, given: Mapping[str, Any], windows: Tensor) -> tuple[Any, float]:
        from graphprune import apply
        from graphprune.rewrite.retrace import retrace
        from graphprune.training import Training, recover
        from graphprune.training.core.options import with_preset

        dense = self.bench.program
        program, masks = dense, {}
        if row.target:
            start = self._start(row.target)
            program, masks = start.program, start.masks
            if start.plan.kept_units:
                program = retrace(apply(program, start.plan))
        options = Training(**with_preset(given))
        teacher = dense if options.needs_teacher else None
        begun = time.process_time()
        found = recover(program, windows, options, masks=masks, teacher=teacher)
        return found.program.module, round(time.process_time() - begun, 1)

    @property
    def training(self) -> Tensor:
        """Windows to train on: those that follow the calibration windows."""
        from graphprune.calibration.text.read import load_tokenizer, read_text, windows

        text = read_text(self.bench.texts / "valid.txt")
        count = WINDOWS + math.ceil(TOKENS / LENGTH)
        cut = windows(load_tokenizer(self.bench.model), text, length=LENGTH, count=count)
        return cut[WINDOWS:]

    def _start(self, target: str) -> Start:
        """What one-shot pruning leaves, computed once."""
        if target not in self.known:
            self.known = {target: self._read(target) or self._written(target, self._pruned(target))}
        return self.known[target]

    def _pruned(self, target: str) -> Start:
        from graphprune import Plan, select, solvers, sparsify
        from graphprune.passes.masks import method
        from graphprune.passes.repair import structured

        dense, data = self.bench.program, self.bench.calibration
        begun = time.process_time()
        plan, masks = Plan(dense.fingerprint, {}), {}
        if target in WIDTHS:
            counts = select(dense, **WIDTHS[target], score="random")
            keep = {n: _count(units) for n, units in counts.kept_units.items()}
            chosen = structured.obs(dense, data, keep)
            plan = chosen.plan
            program = structured.reconstruct(dense, data, plan).program
        elif target.endswith("layers"):
            layers = max(len(s.blocks) for s in dense.structures)
            shape = {"layers": layers + int(target.split()[0])}
            plan = select(dense, shape=shape, score="block-influence", calibration=data)
            program = structured.reconstruct(dense, data, plan).program
        else:
            if ":" in target:
                kept, of = map(int, target.split(":"))
                pattern: Any = solvers.NM(kept, of)
            else:
                pattern = solvers.Unstructured(float(target.removesuffix(" %")) / 100)
            found = sparsify(dense, data, method("alps", {}), pattern, reference=True)
            program = found.program
            masks = {e.parameter: program.weights[e.parameter] != 0 for e in found.layers}
        return Start(program, plan, masks, round(time.process_time() - begun, 1))

    def _read(self, target: str) -> Start | None:
        from safetensors.torch import load_file

        from graphprune import Plan
        from graphprune.streaming import apply_weights

        folder = None if self.kept is None else self.kept / f"start-{_slug(target)}"
        if folder is None or not (folder / "facts.json").exists():
            return None
        facts = json.loads((folder / "facts.json").read_text())
        program = apply_weights(self.bench.program, load_file(folder / "weights.safetensors"))
        masks = {name: program.weights[name] != 0 for name in facts["masked"]}
        plan = Plan.load(folder / "plan.json")
        return Start(program, plan, masks, facts["seconds"])

    def _written(self, target: str, start: Start) -> Start:
        from safetensors.torch import save_file

        if self.kept is not None:
            folder = self.kept / f"start-{_slug(target)}"
            folder.mkdir(parents=True, exist_ok=True)
            names = start.program.trainable - set(start.program.aliases)
            weights = {n: start.program.weights[n].detach().contiguous() for n in names}
            save_file(weights, folder / "weights.safetensors")
            start.plan.save(folder / "plan.json")
            facts = {"masked": sorted(start.masks), "seconds": start.seconds}
            (folder / "facts.json").write_text(json.dumps(facts))
        return start


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _count(units: Any) -> int:
    return len(units[0]) if isinstance(units[0], tuple) else len(units)
