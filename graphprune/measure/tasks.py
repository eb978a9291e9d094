"""Benchmarks of EleutherAI's lm-evaluation-harness, on checkpoints as graphprune writes them.

The harness (``pip install 'graphprune[eval]'``) brings the tasks and their metrics. What is here
opens the checkpoint, packed or not, and hands it over.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.checkpoints.given import check_source, directory_of
from graphprune.checkpoints.own_code import open_part
from graphprune.errors import EvaluationError, GraphPruneError
from graphprune.exclusive import one_at_a_time
from graphprune.files.paths import is_factory

if TYPE_CHECKING:
    from rich.console import RenderableType

_ERROR = "_stderr"
"""What the harness adds to a metric's name for its standard error."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: what the harness calls it.
        metric: likewise, with the name of a filter of answers where it isn't ``none``.
        value: of all samples.
        error: its standard error; None where the harness gives none.
    """

    task: str
    metric: str
    value: float
    error: float | None = None


@dataclass(frozen=True)
class Scores:
    """What models scored on tasks.

    Attributes:
        models: by source, the dense one first where there are two.
    """

    models: Mapping[str, tuple[TaskScore, ...]]

    def to_json(self) -> str:
        """Everything as JSON: source, ``tasks``, task, metric."""
        data: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
        for source, scores in self.models.items():
            tasks: dict[str, dict[str, Any]] = {}
            for one in scores:
                found = {"value": one.value, "stderr": one.error}
                tasks.setdefault(one.task, {})[one.metric] = found
            data[source] = {"tasks": tasks}
        return json.dumps(data, indent=2) + "\n"

    def render(self) -> RenderableType:
        """A table with a row for each metric, for a rich console."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("task", overflow="fold")
        table.add_column("metric")
        for source in self.models:
            table.add_column(Text(Path(source).name), justify="right", overflow="fold")
        columns = [{(s.task, s.metric): s for s in scores} for scores in self.models.values()]
        for task, metric in columns[0]:
            cells = [_cell(column.get((task, metric))) for column in columns]
            table.add_row(Text(task), metric, *cells)
        return table


@one_at_a_time
def measure_tasks(
    sources: Sequence[str],
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    progress: Callable[[str], None] = lambda stage: None,
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> Scores:
    """Score language models on tasks of lm-evaluation-harness.

    Args:
        sources: checkpoints or hub ids, packed ones too.
        tasks: names of tasks or groups, as ``lm-eval ls tasks`` lists them.
        include: a folder with task files of one's own. The harness runs Python code that they name.
        shots: solved examples before each question; None for what a task says.
        limit: samples of each task; None for all.
        batch: samples at once.
        progress: told of each model.
        trust: whether checkpoints may run code of their own.
        allow_unused_weights: see `graphprune.load`.

    Raises:
        EvaluationError: the harness isn't installed, has no such task, or can't score a model.
        LoadError: a model can't be opened.
    """
    for source in sources:
        _check_checkpoint(source)
    manager = _manager(include)
    _check_names(tasks, manager)
    found = {}
    for source in sources:
        progress(f"loading {source}")
        path = directory_of(source, trust=trust)
        model = _opened(path, batch, trust, allow_unused_weights)
        progress(f"scoring {source} on {', '.join(tasks)}")
        found[source] = _scores(source, model, tasks, manager, shots, limit)
    return Scores(found)


def _check_checkpoint(source: str) -> None:
    if is_factory(source) or Path(source).suffix in (".onnx", ".pt2"):
        raise EvaluationError(
            "tasks are scored for Hugging Face checkpoints only",
            where=source,
            why="lm-evaluation-harness needs the tokenizer and the configuration of a checkpoint",
            hint="give the checkpoint (compile with --format hf)",
        )
    check_source(source)


def _manager(include: Path | None) -> Any:
    """The harness's list of tasks."""
    if find_spec("lm_eval") is None:
        raise EvaluationError(
            "tasks need lm-evaluation-harness",
            why="it isn't installed",
            hint="pip install 'graphprune[eval]'",
        )
    if include is not None and not include.is_dir():
        raise EvaluationError("there is no such folder of tasks", where=f"--include-path {include}")
    with redirect_stdout(sys.stderr):
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=None if include is None else str(include))


def _check_names(tasks: Sequence[str], manager: Any) -> None:
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise EvaluationError(
            f"lm-evaluation-harness has no task {unknown[0]}",
            where="--tasks",
            hint="`lm-eval ls tasks` lists them; --include-path adds a folder of your own",
        )


def _opened(path: Path, batch: int, trust: bool, allow_unused_weights: bool) -> Any:
    """A checkpoint as a model of the harness."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from graphprune.runtime.sessions import model

    opened = model(path, format="file", trust=trust, allow_unused_weights=allow_unused_weights)
    try:
        tokenizer = open_part(AutoTokenizer, path, "the tokenizer", trust=trust)
    except GraphPruneError:
        raise
    except Exception as error:  # tokenizers raise what they like
        raise EvaluationError(
            "tasks need a tokenizer, and the checkpoint's can't be opened",
            where=str(path),
            why=_first_line(error),
        ) from error
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise EvaluationError(
            "tasks need a tokenizer with a token that begins or ends a text",
            where=str(path),
            why="the harness puts one before texts that have no context",
            hint="set eos_token or bos_token in tokenizer_config.json",
        )
    with redirect_stdout(sys.stderr):
        return HFLM(pretrained=opened, tokenizer=tokenizer, batch_size=batch)


def _scores(
    source: str,
    model: Any,
    tasks: Sequence[str],
    manager: Any,
    shots: int | None,
    limit: int | None,
) -> tuple[TaskScore, ...]:
    from lm_eval import simple_evaluate

    try:
        with redirect_stdout(sys.stderr):
            found = simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
    except Exception as error:  # data sets that can't be had, task files with mistakes
        raise EvaluationError(
            "lm-evaluation-harness can't score the model",
            where=source,
            why=f"{type(error).__name__}: {_first_line(error)}",
            hint="tasks take their data from the Hugging Face hub, once; "
            "GRAPHPRUNE_DEBUG=1 shows where it failed",
        ) from error
    return tuple(
        score for task, results in found["results"].items() for score in _of_task(task, results)
    )


def _of_task(task: str, results: Mapping[str, Any]) -> list[TaskScore]:
    """The metrics of a task, which the harness calls ``METRIC,FILTER``."""
    scores = []
    for key, value in results.items():
        metric, comma, answers = key.partition(",")
        if not comma or metric.endswith(_ERROR) or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}{_ERROR},{answers}")
        name = metric if answers == "none" else f"{metric} ({answers})"
        known = float(error) if isinstance(error, int | float) else None
        scores.append(TaskScore(task, name, float(value), known))
    return scores


def _cell(score: TaskScore | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.4g}" + ("" if score.error is None else f" ± {score.error:.2g}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""
