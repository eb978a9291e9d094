"""ONNX decoders with a key-value cache from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

import graphprune as gp
from cli.helpers import Result, check_failure, compile_broken, tree
from graphprune.runtime.generation import generate

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def slim(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, without a layer and a third of the heads of those that stay."""
    output = tmp_path_factory.mktemp("decoder") / "slim.onnx"
    recipe = {"remove": {"layers": "1/3", "kv_heads": "1/3"}, "score": "magnitude"}
    gp.compile(str(dense), recipe, output, formats=["onnx-decoder"])
    return output


def test_what_is_written(slim: Path) -> None:
    assert tree(slim.parent) == [
        "slim.onnx",
        "slim.onnx.graphprune_plan.json",
        "slim.onnx.recipe.yaml",
        "slim.onnx.report.html",
        "slim.onnx.report.json",
    ]
    report = json.loads((slim.parent / "slim.onnx.report.json").read_text())
    assert report["run"]["outputs"] == [str(slim)]
    assert report["kept"] == {"kv_heads": [4, 9], "layers": [2, 3]}


def test_it_generates_what_the_checkpoint_would(slim: Path, dense: Path) -> None:
    program = gp.load(str(dense))
    assert isinstance(program, gp.Program)
    module = gp.apply(program, gp.Plan.load(f"{slim}.graphprune_plan.json")).module
    prompt = [11, 42, 7, 63]
    wanted = module.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None
    )
    assert generate(slim, [prompt], 9).tolist() == wanted.tolist()


def test_verify_and_eval(run: Callable[..., Result], slim: Path, tmp_path: Path) -> None:
    result = run("verify", slim)
    assert result.code == 0, result.err
    assert result.out.startswith("slim.onnx: verified: outputs match the masked model within")
    measured = run("eval", slim, "--length", 8, "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)[str(slim)]["onnxruntime"]["seconds"] > 0

    model = onnx.load(slim)
    weight = next(w for w in model.graph.initializer if w.name == "model.embed_tokens.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    for name in ("graphprune_plan.json", "report.json"):
        copy = tmp_path / f"slim.onnx.{name}"
        copy.write_bytes((slim.parent / copy.name).read_bytes())
    onnx.save(model, tmp_path / "slim.onnx")
    check_failure(run("verify", tmp_path / "slim.onnx"), "does not compute what the masked model")


def test_outputs_that_cannot_hold_a_decoder(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    flags = ("--remove", "ffn=0.5", "--format", "onnx-decoder")
    result = run("compile", dense, "-o", tmp_path / "slim.pt2", *flags)
    check_failure(result, "a .pt2 file can't hold onnx-decoder")
    result = run("compile", dense, "-o", tmp_path / "slim.onnx", *flags, "--format", "onnx")
    check_failure(result, "a .onnx file can't hold onnx, onnx-decoder")
    assert tree(tmp_path) == []
    program = gp.load(str(dense))
    assert isinstance(program, gp.Program)
    traced = tmp_path / "dense.pt2"
    gp.apply(program, gp.Plan(program.fingerprint, {})).save(traced, "pt2")
    result = compile_broken(run, traced, tmp_path, *flags)
    check_failure(result, "not a causal language model of transformers", "it is a graph")


def test_help_names_the_format(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "hf, onnx, onnx-decoder or pt2" in run("compile", "--help").out
