"""What each mistake is told; nothing is left of a compilation that failed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune
import graphprune.pipeline.compiler
from cli.helpers import Result, check_failure, compile_broken, damaged, tree
from graphprune.errors import EmitError
from graphprune.rewrite.slim import Slim


def test_no_such_source(run: Callable[..., Result], tmp_path: Path) -> None:
    for command in ("inspect", "eval"):
        check_failure(run(command, tmp_path / "none"), "no such")
    check_failure(compile_broken(run, tmp_path / "none", tmp_path), "no such")
    check_failure(compile_broken(run, tmp_path / "none.pt2", tmp_path), "no such file")
    check_failure(compile_broken(run, "nobody/nothing", tmp_path), "nobody/nothing")
    check_failure(run("eval", tmp_path / "none.onnx"), "does not exist")


def test_a_directory_without_a_config(run: Callable[..., Result], tmp_path: Path) -> None:
    source = tmp_path / "empty"
    source.mkdir()
    check_failure(compile_broken(run, source, tmp_path), "no config.json")


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_broken_config(
    run: Callable[..., Result], dense: Path, tmp_path: Path, config: str
) -> None:
    source = tmp_path / "broken"
    shutil.copytree(dense, source)
    (source / "config.json").write_text(config)
    check_failure(compile_broken(run, source, tmp_path), "config")


def test_truncated_weights(run: Callable[..., Result], dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "cut"
    shutil.copytree(dense, source)
    file = source / "model.safetensors"
    for size in (0, 4, 100, file.stat().st_size // 2):
        file.write_bytes(file.read_bytes()[:size] if size else b"")
        check_failure(compile_broken(run, source, tmp_path), "model.safetensors")
        shutil.copyfile(dense / file.name, file)


def test_a_truncated_pt2(run: Callable[..., Result], compiled: Path, tmp_path: Path) -> None:
    source = tmp_path / "cut.pt2"
    data = (compiled / "model.pt2").read_bytes()
    source.write_bytes(data[: len(data) // 2])
    check_failure(compile_broken(run, source, tmp_path, "--remove", "ffn=0.5", "--format", "pt2"),
                  "cut.pt2")  # fmt: skip


def test_weights_that_do_not_fit_the_config(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"] = torch.ones(7)

    source = damaged(dense, tmp_path, change)
    check_failure(compile_broken(run, source, tmp_path), "model.norm.weight", "(7,)")


def test_weights_that_the_model_does_not_use(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.3.mlp.up_proj.weight"] = torch.ones(64, 48)

    source = damaged(dense, tmp_path, change)
    said = ("doesn't use", "1 tensor: model.layers.3.mlp.up_proj.weight")
    check_failure(compile_broken(run, source, tmp_path), *said, "--allow-unused-weights")
    for command in ("inspect", "eval"):
        check_failure(run(command, str(source)), *said)
    done = run("compile", str(source), "--remove", "ffn=0.5", "--score", "magnitude", "--dry-run",
               "--allow-unused-weights")  # fmt: skip
    assert done.code == 0
    assert said[1] in " ".join(done.out.split())


def test_a_field_of_the_wrong_kind(run: Callable[..., Result], dense: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    path = source / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "rms_norm_eps": "small"}))
    done = compile_broken(run, source, tmp_path)
    check_failure(done, "rms_norm_eps", "config.json", "expected float")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(
    run: Callable[..., Result], dense: Path, tmp_path: Path, value: float
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    source = damaged(dense, tmp_path, change)
    check_failure(
        compile_broken(run, source, tmp_path),
        "not a finite number",
        "model.layers.1.mlp.up_proj.weight",
        f"1 of {64 * 48}",
    )


def test_a_checkpoint_without_weights(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    source = tmp_path / "bare"
    source.mkdir()
    shutil.copyfile(dense / "config.json", source / "config.json")
    check_failure(compile_broken(run, source, tmp_path), "no weights")
    result = run("inspect", source, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["params"] == 53_328


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--target", "params=0.0001"], ["params"]),
        (["--target", "params=1000"], ["params"]),
        (["--remove", "channels=0.5"], ["channels"]),
        (["--remove", "fnn=0.5"], ["did you mean 'ffn'?"]),
        (["--shape", "ffn=65"], ["ffn"]),
        (["--remove", "ffn=0.5", "--exclude", "encoder.*"], ["encoder.*"]),
        (["--remove", "ffn=0.5", "--score", "magntude"], ["did you mean 'magnitude'?"]),
        (["--remove", "ffn=0.5", "--text", "none.txt"], ["none.txt", "does not exist"]),
        (["--remove", "ffn=0.5", "--format", "onx"], ["did you mean 'onnx'?"]),
        (["--plan", "none.json"], ["none.json"]),
        (["none.yaml"], ["none.yaml", "does not exist"]),
    ],
)
def test_what_cannot_be_done(
    run: Callable[..., Result],
    dense: Path,
    tmp_path: Path,
    flags: Sequence[str],
    messages: Sequence[str],
) -> None:
    check_failure(compile_broken(run, dense, tmp_path, *flags), *messages)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("remov: {ffn: 0.25}\n", "did you mean 'remove'?"),
        ("remove: {ffn: 0.25}\nsed: 1\n", "did you mean 'seed'?"),
        ("remove: {ffn: 0.25\n", "not valid YAML"),
        ("", "it is empty"),
    ],
)
def test_a_broken_recipe(
    run: Callable[..., Result], dense: Path, tmp_path: Path, recipe: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    check_failure(compile_broken(run, dense, tmp_path, path), message, str(path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}'])
def test_a_broken_plan(
    run: Callable[..., Result], dense: Path, tmp_path: Path, content: str
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(content)
    check_failure(compile_broken(run, dense, tmp_path, "--plan", plan), str(plan))


def test_the_plan_of_another_model(
    run: Callable[..., Result], compiled: Path, tmp_path: Path
) -> None:
    plan = compiled / "graphprune_plan.json"
    result = compile_broken(run, compiled, tmp_path, "--plan", plan)
    check_failure(result, "doesn't belong to this model")


def test_an_output_that_exists(
    run: Callable[..., Result], dense: Path, compiled: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    flags = ("--remove", "ffn=0.5", "-o", output)
    check_failure(run("compile", dense, *flags), "the output exists", str(output))
    check_failure(run("compile", dense, *flags, "--overwrite"), "graphprune did not write")
    assert tree(tmp_path) == ["slim", "slim/precious.txt"]
    check_failure(
        run("compile", compiled, "--remove", "ffn=0.5", "-o", compiled, "--overwrite"),
        "would replace the source",
    )


def test_a_file_holds_one_format(run: Callable[..., Result], dense: Path, tmp_path: Path) -> None:
    flags = ("--remove", "ffn=0.5", "--format", "hf", "-o", tmp_path / "slim.onnx")
    check_failure(run("compile", dense, *flags), "can't hold hf")


def test_nothing_is_written_if_the_slim_model_is_wrong(
    run: Callable[..., Result], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = graphprune.verify

    def failing(*arguments: Any, **options: Any) -> Any:
        certificate = real(*arguments, **options)
        return replace(certificate, passed=False, failed_output="logits", problem="it differs")

    monkeypatch.setattr("graphprune.pipeline.checking.verify", failing)
    check_failure(compile_broken(run, dense, tmp_path), "does not compute", "logits")


@pytest.mark.parametrize(
    ("error", "code"), [(EmitError("no"), 1), (OSError(28, "No space left"), 1),
                        (KeyboardInterrupt(), 130)]
)  # fmt: skip
@pytest.mark.parametrize("name", ["slim", "slim.pt2"])
def test_nothing_is_left_if_writing_fails(
    run: Callable[..., Result],
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    name: str,
) -> None:
    real = Slim.save

    def failing(self: Slim, path: Path, format: Any = "hf") -> None:
        real(self, path, format)
        raise error

    monkeypatch.setattr(Slim, "save", failing)
    output = tmp_path / "output" / name
    flags = ("--remove", "ffn=0.5", "--format", "pt2", "-o", output)
    result = run("compile", dense, *flags)
    assert result.code == code
    assert "Traceback" not in result.err
    assert tree(output.parent) == []


LONG = "n" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", LONG),
        ("inspect", f"{LONG}.onnx"),
        ("inspect", f"{LONG}.pt2"),
        ("inspect", f"{LONG}.py:made"),
        ("inspect", f"package.{LONG}:made"),
        ("eval", LONG),
        ("verify", LONG),
        ("pack", LONG, "-o", "packed"),
        ("pack", "DENSE", "-o", LONG),
        ("compile", "DENSE", "-o", LONG, "--remove", "ffn=0.5"),
        ("compile", "DENSE", "-o", f"{LONG}.pt2", "--remove", "ffn=0.5"),
        ("compile", "DENSE", LONG, "--dry-run"),
        ("compile", "DENSE", "--plan", LONG, "--dry-run"),
        ("compile", "DENSE", "-o", "out", "--score", "obs", "--remove", "ffn=0.5", "--data", LONG),
        ("compile", "DENSE", "-o", "out", "--score", "obs", "--remove", "ffn=0.5", "--text", LONG),
    ],
)  # fmt: skip
def test_paths_that_the_file_system_does_not_take(
    run: Callable[..., Result],
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: Sequence[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(dense if word == "DENSE" else word for word in words))
    if not words[-1].startswith("package."):  # which is not taken for a file's name alone
        check_failure(result, "nnn")
        assert "too long" in result.err or "no such" in result.err
    check_failure(result)
    assert tree(tmp_path) == []


def test_too_little_memory_is_not_our_error(
    run: Callable[..., Result], dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("graphprune.frontends.load", load)
    check_failure(run("inspect", dense), "not enough memory")


@pytest.mark.parametrize("content", [b"\xff", b"[" * 10_000, b"remove: {ffn: 0.5}", b"{}"])
def test_what_is_given_for_a_plan(
    run: Callable[..., Result], dense: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    check_failure(
        run("compile", dense, "--dry-run", "--plan", tmp_path / "plan.json"),
        "not a graphprune plan", "plan.json",
    )  # fmt: skip
