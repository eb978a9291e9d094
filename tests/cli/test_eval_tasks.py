"""`graphprune eval --tasks`, held against lm-eval's own command and a plain computation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graphprune.pipeline.compiler
from cli.helpers import Result, check_failure
from graphprune.packing import pack

TASK = """task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"{a}{b}=", "choices": [b + a, a, "xyz", "Q"], "answer": n % 4}
    for n, (a, b) in enumerate(zip("abcdefghijkl", "mnopqrstuvwx", strict=True))
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task, whose data is a file beside it."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "letters.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / "letters.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture(scope="module")
def dense(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a tokenizer that ends texts, which the harness wants."""
    copy = tmp_path_factory.mktemp("ending") / "dense"
    shutil.copytree(dense, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.eos_token = "[UNK]"
    tokenizer.save_pretrained(copy)
    return copy


@pytest.fixture(scope="module")
def compiled(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its half."""
    output = tmp_path_factory.mktemp("ending") / "slim"
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude"}
    graphprune.pipeline.compiler.compile(str(dense), recipe, output)
    return output


def by_hand(path: Path, *, normalised: bool = False) -> float:
    """The share of questions whose most likely choice is right."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    right = 0
    for one in QUESTIONS:
        sums = []
        start = tokenizer(one["question"])["input_ids"]
        for choice in one["choices"]:
            end = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(end)[:, None])
            sums.append(float(picked.sum()) / (len(choice) if normalised else 1))
        right += sums.index(max(sums)) == one["answer"]
    return right / len(QUESTIONS)


def scores(run: Callable[..., Result], tasks: Path, *models: object) -> dict[str, dict]:
    flags = ("--tasks", "letters", "--include-path", tasks, "--json")
    result = run("eval", *models, *flags)
    assert result.code == 0, result.err
    return {name: one["tasks"]["letters"] for name, one in json.loads(result.out).items()}


def test_scores_are_those_of_a_plain_computation(
    run: Callable[..., Result], compiled: Path, dense: Path, tasks: Path
) -> None:
    found = scores(run, tasks, compiled, "--against", dense)
    assert list(found) == [str(dense), str(compiled)]
    for path in (dense, compiled):
        assert found[str(path)]["acc"]["value"] == by_hand(path)
        assert found[str(path)]["acc_norm"]["value"] == by_hand(path, normalised=True)
        assert found[str(path)]["acc"]["stderr"] > 0


@pytest.mark.slow
def test_the_command_of_the_harness_says_the_same(
    run: Callable[..., Result], compiled: Path, tasks: Path, tmp_path: Path
) -> None:
    # Slow: a second process imports torch, transformers and datasets.
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={compiled}", "--tasks", "letters"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ, timeout=300)
    (file,) = (tmp_path / "out").rglob("results*.json")
    wanted = json.loads(file.read_text())["results"]["letters"]
    (found,) = scores(run, tasks, compiled).values()
    for metric in ("acc", "acc_norm"):
        assert found[metric]["value"] == wanted[f"{metric},none"]
        assert found[metric]["stderr"] == pytest.approx(wanted[f"{metric}_stderr,none"])


def test_packed_and_self_contained_checkpoints(
    run: Callable[..., Result], dense: Path, tasks: Path, tmp_path: Path
) -> None:
    uneven = {"model.layers.0.*/ffn": 0.25, "model.layers.1.*/ffn": 0.5}
    recipe = {"steps": [
        {"select": {"remove": uneven, "score": "magnitude"}},
        {"sparsify": {"method": "magnitude", "sparsity": 0.6}},
    ]}  # fmt: skip
    slim = tmp_path / "slim"
    graphprune.pipeline.compiler.compile(str(dense), recipe, slim)
    assert (slim / "modeling_graphprune.py").is_file()
    pack(slim, tmp_path / "packed")
    found = scores(run, tasks, tmp_path / "packed", "--against", slim)
    assert {one["acc"]["value"] for one in found.values()} == {by_hand(slim)}


def test_the_table(run: Callable[..., Result], dense: Path, tasks: Path) -> None:
    flags = ("--include-path", tasks, "--limit", 4, "--num-fewshot", 0, "--batch-size", 2)
    result = run("eval", dense, "--tasks", "letters", *flags)
    assert result.code == 0, result.err
    row = next(line for line in result.out.splitlines() if line.startswith("letters"))
    assert row.split()[1] == "acc"
    assert "±" in row


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "no-such-task"), "no task no-such-task"),
        (("--tasks", "letters", "--include-path", "nowhere"), "no such folder"),
    ],
)
def test_what_isnt_there(
    run: Callable[..., Result], dense: Path, tasks: Path, flags: tuple[str, ...], message: str
) -> None:
    check_failure(run("eval", dense, *flags), message)


def test_of_other_formats_no_task_is_scored(run: Callable[..., Result]) -> None:
    result = run("eval", "model.onnx", "--tasks", "letters")
    check_failure(result, "checkpoints only")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--limit", 3), "--limit goes with --tasks"),
        (("--batch-size", 1), "--batch-size goes with --tasks"),
        (("--tasks", "letters", "--windows", 4), "--tasks doesn't go with --windows"),
        (("--tasks", "letters", "--fail-if", "kl>1"), "--tasks doesn't go with --fail-if"),
        (("--tasks", ","), "--tasks names none"),
    ],
)
def test_no_option_is_left_aside(
    run: Callable[..., Result], flags: tuple[object, ...], message: str
) -> None:
    result = run("eval", "model", *flags)
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())


def test_without_the_harness(
    run: Callable[..., Result], dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.measure.tasks.find_spec", lambda name: None)
    check_failure(run("eval", dense, "--tasks", "hellaswag"), "graphprune[eval]")
