"""What lies beside a model is enough to make it again, byte by byte."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from torch import nn

import graphprune as gp
from cli.helpers import CYCLE, Result, check_failure, tree
from graphprune.recipe.recipe import Recipe
from onnx_graphs import graph, weights

TEXT = "g (float[N,20] x) => (float[N,3] y) { h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c) }"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "dense.onnx"
    onnx.save(graph(TEXT, a=weights(20, 16), c=weights(16, 3)), file)
    return file


def sha256(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def basenames(text: str) -> str:
    return re.sub(r"/[^\s\"]*/", "", text)


def check_equal(first: Path, second: Path) -> None:
    """Two directories hold the same bytes, apart from what the reports have under ``run``."""
    assert tree(first) == tree(second)
    for name in tree(first):
        if (first / name).is_dir() or name.endswith("report.html"):  # made of the report
            continue
        one, two = (folder.joinpath(name).read_bytes() for folder in (first, second))
        if name.endswith("report.json"):
            # Texts are named as they were given.
            reports = [json.loads(basenames(text.decode())) for text in (one, two)]
            assert all(set(report.pop("run")) == RUN for report in reports)
            assert reports[0] == reports[1]
        else:
            assert one == two, name


RUN = {"date", "command", "outputs", "seconds", "latency"}


@pytest.mark.slow  # two checkpoints, each with refits and loaded in a fresh process
@pytest.mark.parametrize(
    ("form", "more", "score"),
    [("hf", (), "obs"), ("pt2", ("--remove", "layers=1/3"), "auto")],
    ids=["by one score", "by several scores"],
)
def test_a_recipe_makes_the_output_again(
    run: Callable[..., Result],
    taught: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    more: tuple[str, ...],
    score: str,
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "cycles.txt").write_text(CYCLE * 600)
    monkeypatch.chdir(tmp_path / "here")
    words = ("compile", taught, "--remove", "ffn=0.25", *more, "--data", "cycles.txt",
             "--format", form, "--seed", 5)  # fmt: skip
    first = run(*words, "-o", tmp_path / "first")
    assert first.code == 0, first.err
    monkeypatch.chdir(tmp_path)
    again = run("compile", taught, tmp_path / "first" / "recipe.yaml", "-o", tmp_path / "second")
    assert again.code == 0, again.err
    check_equal(tmp_path / "first", tmp_path / "second")

    text = (tmp_path / "first" / "recipe.yaml").read_text()
    remove = {"ffn": 0.25, **({"layers": 1 / 3} if more else {})}
    assert yaml.safe_load(text) == {
        "remove": remove,
        "score": score,
        "repair": "none",
        "calibration": {"data": str(tmp_path / "here" / "cycles.txt"), "general": 0.5},
        "seed": 5,
        "formats": [form],
    }
    version = importlib.metadata.version("graphprune")
    assert text.splitlines()[0].startswith(f"# Made by graphprune {version}. ")
    assert "# refits: " in text
    assert ("# score: auto is obs" in text) == (score == "auto")
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert report["provenance"]["seed"] == 5
    data = report["provenance"]["data"]
    assert data[str(tmp_path / "here" / "cycles.txt")]["sha256"] == sha256(Path("here/cycles.txt"))
    files = report["provenance"]["source"]["files"]
    assert files["model.safetensors"] == sha256(taught / "model.safetensors")
    assert files["config.json"] == sha256(taught / "config.json")
    command = ["graphprune", *map(str, words), "-o", str(tmp_path / "first")]
    assert shlex.split(report["run"]["command"]) == command


def test_a_report_tells_versions_and_hashes(
    run: Callable[..., Result], source: Path, tmp_path: Path
) -> None:
    slim = tmp_path / "slim.onnx"
    assert run("compile", source, "-o", slim, "--remove", "*=0.5").code == 0
    assert tree(tmp_path) == [
        "in",
        "in/dense.onnx",
        "slim.onnx",
        "slim.onnx.graphprune_plan.json",
        "slim.onnx.recipe.yaml",
        "slim.onnx.report.html",
        "slim.onnx.report.json",
    ]
    report = json.loads(Path(f"{slim}.report.json").read_text())
    found = report["provenance"]
    for name in ("graphprune", "torch", "transformers", "onnx", "onnxruntime", "numpy"):
        assert found["versions"][name] == importlib.metadata.version(name)
    assert found["versions"]["python"] == platform.python_version()
    assert found["source"] == {
        "of": "file",
        "sha256": sha256(source),
        "bytes": source.stat().st_size,
        "files": None,
    }
    assert found["data"] == found["samples"] == {}
    assert yaml.safe_load(Path(f"{slim}.recipe.yaml").read_text()) == {
        "remove": {"*": 0.5},
        "score": "magnitude",
        "repair": "none",
        "seed": 0,
        "formats": ["onnx"],
    }


def test_two_runs_write_the_same(source: Path, tmp_path: Path) -> None:
    recipe = {"remove": {"*": 0.5}, "align": 2, "score": {"name": "magnitude", "norm": "l1"}}
    for name in ("first", "second"):
        gp.compile(source, recipe, tmp_path / name)
    gp.compile(source, tmp_path / "first" / "recipe.yaml", tmp_path / "third")
    check_equal(tmp_path / "first", tmp_path / "second")
    check_equal(tmp_path / "first", tmp_path / "third")
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert report["run"]["command"] is None


def test_a_plan_that_was_replayed(source: Path, tmp_path: Path) -> None:
    gp.compile(source, {"remove": {"*": 0.5}}, tmp_path / "first")
    plan = tmp_path / "first" / "graphprune_plan.json"
    gp.compile(source, {"plan": str(plan)}, tmp_path / "second")
    recipe = yaml.safe_load((tmp_path / "second" / "recipe.yaml").read_text())
    assert recipe == {"plan": str(plan), "repair": "none", "seed": 0, "formats": ["onnx"]}
    gp.compile(source, tmp_path / "second" / "recipe.yaml", tmp_path / "third")
    check_equal(tmp_path / "second", tmp_path / "third")
    report = json.loads((tmp_path / "third" / "report.json").read_text())
    assert report["provenance"]["data"][str(plan)]["sha256"] == sha256(plan)


def test_arrays_and_what_was_made_of_them(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    x = np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)
    np.save(tmp_path / "data" / "x.npy", x)
    wanted = {"data": str(tmp_path / "data" / "x.npy"), "draw": "first", "windows": 48}
    recipe = {"remove": {"*": 0.5}, "repair": "reconstruct", "calibration": wanted}
    gp.compile(source, recipe, tmp_path / "slim")
    report = json.loads((tmp_path / "slim" / "report.json").read_text())["provenance"]
    assert report["data"][wanted["data"]]["sha256"] == sha256(tmp_path / "data" / "x.npy")
    lines = b"['x'] float32 [48, 20]\n" + x[:48].tobytes()
    assert report["samples"]["refits"]["sha256"] == hashlib.sha256(lines).hexdigest()
    found = Recipe.load(tmp_path / "slim" / "recipe.yaml")
    assert found.calibration == Recipe.parse(recipe).calibration


def test_a_module_in_memory_is_a_comment(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    recipe = {"remove": {"ffn": 0.5}}
    gp.compile(module, recipe, tmp_path / "o.pt2", example=(torch.randn(2, 4),))
    text = (tmp_path / "o.pt2.recipe.yaml").read_text()
    assert "# " in text
    assert "MODEL: a Sequential in memory" in text
    recipe = yaml.safe_load(text)
    assert recipe == {"remove": {"ffn": 0.5}, "score": "magnitude", "repair": "none", "seed": 0,
                      "formats": ["pt2"]}  # fmt: skip
    gp.compile(module, recipe, tmp_path / "p.pt2", example=(torch.randn(2, 4),))
    assert sha256(tmp_path / "o.pt2.graphprune_plan.json") == sha256(
        tmp_path / "p.pt2.graphprune_plan.json"
    )
    report = json.loads((tmp_path / "p.pt2.report.json").read_text())["provenance"]
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} float32 {list(value.shape)}\n".encode() + value.numpy().tobytes())
    assert report["source"]["of"] == "weights"
    assert report["source"]["sha256"] == digest.hexdigest()


@pytest.mark.parametrize(
    "name", ["a\nremove: {ffn: 0.9}\n.onnx", "b\u2028c\x85d: 1.onnx", "'é.onnx"]
)
def test_no_path_can_write_a_line_of_the_recipe(source: Path, tmp_path: Path, name: str) -> None:
    odd = source.rename(tmp_path / name)
    gp.compile(odd, {"remove": {"*": 0.5}}, tmp_path / "slim")
    recipe = Recipe.load(tmp_path / "slim" / "recipe.yaml")
    assert recipe.remove == {"*": 0.5}


def test_verify_tells_that_the_model_has_changed(
    run: Callable[..., Result], source: Path, tmp_path: Path
) -> None:
    slim = tmp_path / "slim.onnx"
    assert run("compile", source, "-o", slim, "--remove", "*=0.5").code == 0
    same = run("verify", slim)
    assert (same.code, "note" in same.err) == (0, False)
    model = onnx.load(source)
    model.doc_string = "as it was, in other words"
    onnx.save(model, source)
    touched = run("verify", slim)
    assert touched.code == 0
    assert (
        f"note: the dense model isn't what it was when this was compiled: {source}" in touched.err
    )
    onnx.save(graph(TEXT, a=weights(20, 16) * 2, c=weights(16, 3)), source)
    check_failure(run("verify", slim), "note: the dense model isn't what it was")
    slim.with_name("slim.onnx.report.json").write_text("{}")  # of an older version
    assert "note" not in run("verify", slim, "--source", source).err


@pytest.mark.parametrize("kind", ["text", "directory"])
def test_data_by_its_content(tmp_path: Path, kind: str) -> None:
    from graphprune.report.digests import data_digest

    if kind == "text":
        from pydoc_data.topics import topics

        found = data_digest("help")
        raw = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        assert found is not None
        assert (found.of, found.sha256) == ("text", hashlib.sha256(raw).hexdigest())
        assert data_digest("self") is None
        assert data_digest("json:loads") is None
        return
    for name in ("b.txt", "a/c.txt", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name * 7)
    found = data_digest(str(tmp_path))
    hashes = {
        name: hashlib.sha256((name * 7).encode()).hexdigest() for name in ("a/c.txt", "b.txt")
    }
    lines = "".join(f"{value}  {name}\n" for name, value in hashes.items())  # of sha256sum
    assert found is not None
    assert found.files == hashes
    assert found.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert found.bytes == 7 * 12
