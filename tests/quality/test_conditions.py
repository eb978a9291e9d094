"""Conditions that end a run: what they mean, and what the command line does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune as gp
from graphprune import cli
from graphprune.errors import ConditionError, EvaluationError, RecipeError
from graphprune.quality.conditions import Condition
from graphprune.recipe import Recipe
from quality.helpers import by_hand, expected, save_model, save_text


@pytest.mark.parametrize(
    ("text", "value", "held"),
    [
        ("perplexity>+50%", 1.51, True),
        ("perplexity>+50%", 1.5, False),
        (" perplexity > + 50 % ", 1.6, True),
        ("parameters>-20%", 0.81, True),
        ("parameters>-20%", 0.79, False),
        ("perplexity>30", 30.5, True),
        ("agreement<0.9", 0.89, True),
        ("agreement<90%", 0.91, False),
        ("kl>1e-1", 0.2, True),
        ("macs>1.5G", 1_600_000_000, True),
        ("bytes<100M", 100_000_001, False),
    ],
)
def test_what_conditions_mean(text: str, value: float, held: bool) -> None:
    assert (Condition.parse(text).check(value) is not None) == held


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexity", "is not a condition"),
        ("perplexity>", "is not a condition"),
        ("perplexity>=2", "is not a condition"),
        ("perplexity=2", "is not a condition"),
        (">2", "is not a condition"),
        ("perplexty>2", "did you mean 'perplexity'?"),
        ("perplexity>50%", r"write \+50% for 50% more"),
        ("perplexity>+50", r"is not of the form \+50%"),
        ("perplexity>+a%", r"is not of the form \+50%"),
        ("perplexity>+1.2.3%", "is not a number"),
        ("perplexity>two", "is not a number"),
        ("kl>+5%", "compares with the dense model already"),
        ("agreement<90", "is a fraction"),
    ],
)
def test_malformed_conditions_are_refused_with_the_recipe(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({"remove": {"ffn": 0.5}, "fail_if": [text]})


def test_conditions_of_a_recipe_read_back(tmp_path: Path) -> None:
    recipe = Recipe.parse({"remove": {"ffn": 0.5}, "fail_if": "perplexity>+50%"})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    flags = {"fail_if": ["kl>1", "bytes>5M"]}
    assert Recipe.from_flags(tmp_path / "r.yaml", flags).fail_if == ("kl>1", "bytes>5M")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "dense", num_hidden_layers=1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


Run = Callable[..., tuple[int, str, str]]


def recipe_file(folder: Path, texts: list[Path], **more: Any) -> Path:
    calibration = {"text": [str(t) for t in texts], "windows": 4, "length": 20, "draw": "first"}
    path = folder / "recipe.json"
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude", "calibration": calibration, **more}
    path.write_text(json.dumps(recipe))
    return path


def test_compile_ends_with_three_and_the_earlier_output_stays(
    run: Run, dense: Path, tmp_path: Path
) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    ids = [save_text(path, 200, seed) for seed, path in enumerate(texts)]
    recipe = recipe_file(tmp_path, texts)
    output = tmp_path / "out" / "slim"
    command = ("compile", dense, recipe, "-o", output, "--overwrite")
    assert run(*command)[0] == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    found = [expected(dense, output, by_hand(one, 4, 20)) for one in ids]
    ratio = max(one["perplexities"][1] / one["perplexities"][0] for one in found)
    worst = min(one["agreement"][0] for one in found)
    kl = max(one["kl"][0] for one in found)
    near = 1e-3
    failing = [
        f"perplexity>{100 * (ratio * (1 - near) - 1):+.3f}%",
        f"agreement<{worst + near:.4f}",
        f"kl>{kl * (1 - near):.6f}",
    ]
    passing = [
        f"perplexity>{100 * (ratio * (1 + near) - 1):+.3f}%",
        f"agreement<{worst - near:.4f}",
        f"kl>{kl * (1 + near):.6f}",
        "parameters>1M",
    ]
    flags = [word for condition in (failing[0], *passing) for word in ("--fail-if", condition)]
    code, out, err = run(*command, *flags)
    assert (code, out) == (3, "")
    assert f"perplexity is {100 * (ratio - 1):+.1f} % against the dense model" in err
    assert failing[0] in err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in output.parent.iterdir()] == ["slim"]
    code, _, err = run(*command, *(w for c in failing[1:] for w in ("--fail-if", c)))
    assert code == 3
    assert f"agreement is {worst:.4g}" in err
    assert f"kl is {kl:.4g}" in err
    assert run(*command, *(w for c in passing for w in ("--fail-if", c)))[0] == 0
    # The same conditions on the files.
    sources = ("eval", output, "--against", dense, "--length", 20, "--windows", 4)
    options = [word for path in texts for word in ("--text", path)]
    code, out, err = run(*sources, *options, "--fail-if", failing[0])
    assert code == 3
    assert "perplexity on" in out  # what was measured is shown all the same
    assert failing[0] in err
    assert run(*sources, *options, "--fail-if", passing[0])[0] == 0


def test_sizes_are_known_before_weights_are_looked_at(
    run: Run, dense: Path, tmp_path: Path
) -> None:
    command = ("compile", dense, "--remove", "ffn=0.5", "--score", "magnitude", "-o",
               tmp_path / "slim")  # fmt: skip
    total = 2 * 96 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 3 * 32
    slim = total - 3 * 32 * 24
    code, _, err = run(*command, "--fail-if", f"parameters>{slim - 1}")
    assert code == 3
    assert f"parameters is {slim:,}" in err
    assert "cutting" not in err
    change = 100 * (slim / total - 1)
    code, _, err = run(*command, "--dry-run", "--fail-if", f"bytes>{change - 0.1:.2f}%")
    assert code == 3
    assert f"bytes is {change:.1f} % against the dense model" in err
    assert run(*command, "--dry-run", "--fail-if", f"bytes>{change + 0.1:.2f}%")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_evaluated_is_refused_before_work(tmp_path: Path, dense: Path) -> None:
    told: list[str] = []
    wanted = {"remove": {"channels": 0.5}, "fail_if": "perplexity>+5%"}
    vision = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)
    ).eval()
    with pytest.raises(RecipeError, match="not a causal language model"):
        gp.compile(
            vision, wanted, tmp_path / "slim", formats=["pt2"],
            example=(torch.zeros(1, 3, 8, 8),), progress=told.append,
        )  # fmt: skip
    assert told == ["loading and tracing"]
    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        (mute / name).write_bytes((dense / name).read_bytes())
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude", "fail_if": "kl>1"}
    with pytest.raises(RecipeError, match="the checkpoint has no tokenizer"):
        gp.compile(mute, recipe, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_eval_refuses_what_it_cannot_know(run: Run, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")
    for arguments, message in (
        ((dense, "--fail-if", "perplexity>+5%"), "compares with another model"),
        ((dense, "--fail-if", "agreement<0.5"), "compares with another model"),
        ((dense, "--fail-if", "perplexity"), "is not a condition"),
        ((tmp_path / "a.onnx", "--fail-if", "perplexity>5"), "of ONNX files no text is measured"),
    ):
        code, out, err = run("eval", *arguments)
        assert (code, out) == (1, "")
        assert message in err
        assert "loading" not in err


def test_a_number_that_is_needed_and_cannot_be_measured_is_an_error(
    dense: Path, tmp_path: Path
) -> None:
    recipe = json.loads(recipe_file(tmp_path, [tmp_path / "none.txt"]).read_text())
    report = gp.compile(dense, recipe, tmp_path / "slim")
    assert any("none.txt not measured" in note for note in report.notes)
    assert (tmp_path / "slim" / "model.safetensors").exists()
    with pytest.raises(EvaluationError, match="a condition of --fail-if needs it"):
        gp.compile(dense, recipe | {"fail_if": "kl>9"}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert issubclass(ConditionError, gp.GraphPruneError)
