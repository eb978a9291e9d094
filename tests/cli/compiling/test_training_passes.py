"""Matching and recovery as passes: what they hold, what they make better, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import graphprune
from cli.helpers import Result, check_failure
from graphprune.errors import RecipeError
from graphprune.recipe.recipe import Recipe

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def ids(cycles: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Windows of the text that the small model has learnt, [64, 32]."""
    import numpy as np
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(dense)(cycles.read_text())["input_ids"]
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.array(tokens[: 64 * 32]).reshape(64, 32))
    return str(path)


def far(path: Path, other: Path, ids: str) -> float:
    """The mean Kullback-Leibler divergence of a model's predictions from another's."""
    import numpy as np

    tokens = torch.from_numpy(np.load(ids))[:16]
    with torch.no_grad():
        logits, wanted = (
            AutoModelForCausalLM.from_pretrained(p)(tokens).logits.double().log_softmax(-1)
            for p in (path, other)
        )
    return float((wanted.exp() * (wanted - logits)).sum(-1).mean())


def zeros(path: Path) -> dict[str, torch.Tensor]:
    return {n: w == 0 for n, w in load_file(path / "model.safetensors").items() if w.ndim > 1}


def recipe(path: Path, ids: str, **more: Any) -> Path:
    data = {"calibration": {"data": ids, "general": 0.0}, "seed": 1, **more}
    path.write_text(json.dumps(data))
    return path


def test_masks_are_held_while_blocks_are_matched_and_weights_trained(
    run: Run, taught: Path, ids: str, tmp_path: Path
) -> None:
    masks = {"sparsify": {"method": "wanda", "sparsity": 0.6}}
    training = {"match": {"epochs": 2}, "recover": {"steps": 20, "batch": 8, "lr": 1e-3}}
    alone = run(
        "compile", taught, recipe(tmp_path / "1.yaml", ids, **masks), "-o", tmp_path / "cut"
    )
    assert alone.code == 0, alone.err
    whole = run(
        "compile", taught, recipe(tmp_path / "2.yaml", ids, **masks, **training),
        "-o", tmp_path / "trained",
    )  # fmt: skip
    assert whole.code == 0, whole.err
    before, after = zeros(tmp_path / "cut"), zeros(tmp_path / "trained")
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, weight in load_file(tmp_path / "trained" / "model.safetensors").items():
        if name in before:  # +0.0, to the bit
            assert not weight[before[name]].view(torch.int32).any()
    assert far(tmp_path / "trained", taught, ids) < 0.5 * far(tmp_path / "cut", taught, ids)
    report = json.loads((tmp_path / "trained" / "report.json").read_text())
    assert [one["name"] for one in report["passes"]] == ["sparsify", "match", "recover"]
    assert [one["method"] for one in report["trained"]] == ["match", "recover"]
    assert report["trained"][1]["figures"]["steps"] == 20
    assert report["trained"][1]["figures"]["tokens"] == 20 * 8 * 32
    checked = run("verify", tmp_path / "trained")
    assert checked.code == 0, checked.err


def test_a_narrower_model_recovers(run: Run, taught: Path, ids: str, tmp_path: Path) -> None:
    cut = {"remove": {"ffn": 0.5}, "score": "magnitude"}
    training = {"recover": {"steps": 30, "batch": 8, "lr": 2e-3}}
    for name, more in (("cut", {}), ("trained", training)):
        found = run(
            "compile", taught, recipe(tmp_path / f"{name}.yaml", ids, **cut, **more),
            "-o", tmp_path / name,
        )  # fmt: skip
        if name == "cut":  # nothing reads the data then
            assert found.code == 1
            data = tmp_path / "cut.yaml"
            data.write_text(json.dumps({**cut, "seed": 1}))
            found = run("compile", taught, data, "-o", tmp_path / name)
        assert found.code == 0, found.err
    assert far(tmp_path / "trained", taught, ids) < 0.6 * far(tmp_path / "cut", taught, ids)
    assert run("verify", tmp_path / "trained").code == 0
    again = run("compile", taught, tmp_path / "trained" / "recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("trained", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recover_alone_holds_the_zeros_of_a_checkpoint(
    run: Run, taught: Path, ids: str, tmp_path: Path
) -> None:
    masks = ("--sparsify", "magnitude", "--sparsity", "60%")
    assert run("compile", taught, *masks, "-o", tmp_path / "cut").code == 0
    words = ("recover", tmp_path / "cut", "--data", ids, "--teacher", taught, "--lr", "1e-3")
    found = run(*words, "--tokens", 5000, "-o", tmp_path / "trained")
    assert found.code == 0, found.err
    before, after = zeros(tmp_path / "cut"), zeros(tmp_path / "trained")
    treated = [name for name in before if before[name].float().mean() > 0.5]
    assert len(treated) == 21
    assert all(torch.equal(before[name], after[name]) for name in treated)
    assert far(tmp_path / "trained", taught, ids) < 0.6 * far(tmp_path / "cut", taught, ids)


def test_an_effort_says_what_it_does(run: Run, taught: Path, ids: str) -> None:
    words = ("compile", taught, "--remove", "ffn=0.25", "--data", ids, "--dry-run", "--json")
    for effort, wanted in (
        ("fast", ["rank units by taylor"]),
        ("usual", ["choose units by obs, and refit what reads them"]),
        ("balanced", ["choose units by obs, and refit what reads them",
                      "match 3 blocks with the dense model's"]),
        ("best", ["choose units by obs, and refit what reads them",
                  "match 3 blocks with the dense model's", "train what is left (full)"]),
    ):  # fmt: skip
        found = run(*words, "--effort", effort)
        assert found.code == 0, found.err
        passes = json.loads(found.out)["forecast"]["passes"]
        assert passes == [*wanted, "cut", "verify", "write", "measure"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"recover": {"lrr": 1}}, "has no option 'lrr'; did you mean 'lr'?"),
        ({"recover": {"train": "all"}}, "'full', 'norms' or 'lora'"),
        ({"match": {"epochs": -1}}, "0 epochs or more"),
        ({"effort": "max", "remove": {"ffn": 0.1}}, "'max' is not 'fast', 'usual'"),
    ],
)
def test_mistakes(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(entries)
    assert message in f"{caught.value.what} {caught.value.why}"


def test_an_onnx_model_is_not_trained(run: Run, compiled: Path, tmp_path: Path) -> None:
    result = run("recover", compiled / "model.onnx", "-o", tmp_path / "out.onnx")
    check_failure(result, "recover trains by gradients", "which an ONNX graph doesn't have")


@pytest.mark.parametrize("stage", ["matching blocks: 1 of", "training: step 7 of 20"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    taught: Path, ids: str, tmp_path: Path, stage: str
) -> None:
    recipe = {
        "sparsify": {"method": "wanda", "sparsity": 0.6},
        "match": {"epochs": 1},
        "recover": {"steps": 20, "batch": 4, "lr": 1e-3},
        "calibration": {"data": ids, "general": 0.0},
    }

    def stop(told: str) -> None:
        if told.startswith(stage):
            raise KeyboardInterrupt

    graphprune.compile(str(taught), recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt) as caught:
        graphprune.compile(str(taught), recipe, tmp_path / "cut", progress=stop)
    (note,) = caught.value.__notes__
    assert "run again with --resume" in note
    assert ("of training are done" in note) == stage.startswith("training")
    graphprune.compile(str(taught), recipe, tmp_path / "cut", resume=True)
    whole, cut = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut
    assert [path.name for path in tmp_path.iterdir() if "state" in path.name] == []
