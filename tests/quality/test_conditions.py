"""Conditions that end a run: what they mean, and what the command line does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune as gp
from graphprune.cli import app as cli
from graphprune.errors import ConditionError, EvaluationError, RecipeError
from graphprune.frontends import load_traced
from graphprune.quality.conditions import Condition, check_conditions
from graphprune.recipe.recipe import Recipe
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


def recipe_of(texts: list[Path], **more: Any) -> dict[str, Any]:
    calibration = {"text": [str(t) for t in texts], "windows": 4, "length": 20, "draw": "first"}
    return {"remove": {"ffn": 0.5}, "score": "magnitude", "calibration": calibration, **more}


def test_compile_ends_with_three_and_the_earlier_output_stays(
    run: Run, dense: Path, tmp_path: Path
) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    ids = [save_text(path, 200, seed) for seed, path in enumerate(texts)]
    output = tmp_path / "out" / "slim"
    report = gp.compile(dense, recipe_of(texts), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    found = [expected(dense, output, by_hand(one, 4, 20)) for one in ids]
    ratio = max(one["perplexities"][1] / one["perplexities"][0] for one in found)
    value = max(one["perplexities"][1] for one in found)
    worst = min(one["agreement"][0] for one in found)
    kl = max(one["kl"][0] for one in found)

    def conditions(near: float) -> list[str]:
        return [
            f"perplexity>{100 * (ratio * (1 + near) - 1):+.3f}%",
            f"perplexity>{value * (1 + near):.6f}",
            f"agreement<{worst - near:.4f}",
            f"kl>{kl * (1 + near):.6f}",
        ]

    failing, passing = conditions(-1e-3), conditions(1e-3)
    settled = [Condition.parse(text) for text in passing]
    check_conditions(settled, report.before, report.after, report.quality)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_of(texts, fail_if=["kl>900"])))
    flags = [word for text in (*failing, *passing) for word in ("--fail-if", text)]
    command = ("compile", dense, tmp_path / "recipe.json", "-o", output, "--overwrite")
    code, out, err = run(*command, *flags)
    assert (code, out) == (3, "")
    assert f"perplexity is {100 * (ratio - 1):+.1f} % against the dense model" in err
    assert f"perplexity is {value:.4g}" in err
    assert f"agreement is {worst:.4g}" in err
    assert f"kl is {kl:.4g}" in err
    assert all(f"'{text}'" in err for text in failing)
    assert not any(f"'{text}'" in err for text in passing)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in output.parent.iterdir()] == ["slim"]
    # The same conditions on the files.
    options = [word for path in texts for word in ("--text", path)]
    options += [word for text in (failing[0], passing[2]) for word in ("--fail-if", text)]
    code, out, err = run("eval", output, "--against", dense, "--length", 20, "--windows", 4,
                         *options)  # fmt: skip
    assert code == 3
    assert "perplexity on" in out  # what was measured is shown all the same
    assert failing[0] in err
    assert passing[2] not in err


def test_sizes_are_known_before_weights_are_looked_at(dense: Path, tmp_path: Path) -> None:
    program = load_traced(str(dense))
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude"}
    total = 2 * 96 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 3 * 32
    slim = total - 3 * 32 * 24
    change = 100 * (slim / total - 1)
    told: list[str] = []
    with pytest.raises(ConditionError, match=f"parameters are {slim:,}, which") as caught:
        gp.compile(program, recipe | {"fail_if": f"parameters>{slim - 1}"}, tmp_path / "slim",
                   progress=told.append)  # fmt: skip
    assert caught.value.exit_code == 3
    assert "selecting" in told
    assert "cutting" not in told
    with pytest.raises(ConditionError, match=rf"bytes are {change:.1f} % against the dense model"):
        gp.compile(program, recipe | {"fail_if": f"bytes>{change - 0.1:.2f}%"}, dry_run=True)
    gp.compile(program, recipe | {"fail_if": f"bytes>{change + 0.1:.2f}%"}, dry_run=True)
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
    program = load_traced(str(dense))
    save_text(tmp_path / "short.txt", 4 * 19 - 1, 0)
    recipe = recipe_of([tmp_path / "short.txt"])
    report = gp.compile(program, recipe, tmp_path / "slim", formats=["pt2"])
    assert any("short.txt not measured: the text is too short" in note for note in report.notes)
    assert (tmp_path / "slim" / "model.pt2").exists()
    with pytest.raises(EvaluationError, match="a condition of --fail-if needs it"):
        gp.compile(program, recipe | {"fail_if": "kl>9"}, tmp_path / "other", formats=["pt2"])
    assert not (tmp_path / "other").exists()
