"""The command line: what it prints, what it writes, and what each mistake is told."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import graphprune
import graphprune.compiler
from graphprune import _version, cli
from graphprune.errors import EmitError
from graphprune.rewrite.slim import Slim

LETTERS = [chr(code) for code in range(32, 127)]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GRAPHPRUNE_DEBUG", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokens are the printable letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("models") / "dense"
    LlamaForCausalLM(config).save_pretrained(path)
    words = {letter: number for number, letter in enumerate([*LETTERS, "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(3)
    letters = torch.randint(len(LETTERS), (5000,), generator=generator).tolist()
    path.write_text("".join(LETTERS[letter] for letter in letters))
    return path


@pytest.fixture(scope="module")
def compiled(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without a quarter of its ffn and one key-value head of three, in all formats."""
    output = tmp_path_factory.mktemp("compiled") / "slim"
    graphprune.compiler.compile(
        str(dense),
        {
            "remove": {"ffn": 0.25, "kv_heads": "1/3"},
            "calibration": {"text": str(text), "windows": 8, "length": 32},
        },
        output,
        formats=["hf", "onnx", "pt2"],
    )
    return output


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def damaged(dense: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    copy = folder / "damaged"
    shutil.copytree(dense, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


# --- the program itself


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "graphprune.cli", *arguments]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, **options
    )


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["compile", "--help"]])
def test_help_and_version_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from graphprune.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""


def test_version(run: Callable[..., Result]) -> None:
    assert run("--version") == (0, f"graphprune {_version.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile"], "Missing argument"),
        (["compile", "x", "-o", "y"], "say what to remove"),
        (["compile", "x", "--remove", "ffn=0.5"], "give an output with -o, or --dry-run"),
        (["compile", "x", "--sed", "1"], "No such option"),
        (["prune"], "No such command"),
        (["eval", "x", "--length", "1"], "--length"),
    ],
)
def test_wrong_usage_is_code_2(
    run: Callable[..., Result], arguments: list[str], message: str
) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err


def test_an_unexpected_exception_is_a_short_message(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(graphprune.compiler, "compile", broken)
    result = run("compile", "x", "-o", "y", "--remove", "ffn=0.5")
    assert result.code == 1
    assert "internal error: ZeroDivisionError: oh" in result.err
    assert "GRAPHPRUNE_DEBUG=1" in result.err
    assert "Traceback" not in result.err
    monkeypatch.setenv("GRAPHPRUNE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["compile", "x", "-o", "y", "--remove", "ffn=0.5"])


# --- compile


def test_compile_writes_all_formats_and_nothing_else(compiled: Path) -> None:
    written = set(tree(compiled))
    assert written >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "model.onnx",
        "model.pt2",
        "graphprune_plan.json",
        "report.json",
    }
    assert tree(compiled.parent) == ["slim", *sorted(f"slim/{name}" for name in written)]
    model = AutoModelForCausalLM.from_pretrained(compiled)
    assert model.config.intermediate_size == 48
    assert model.config.num_key_value_heads == 2


def test_the_report_says_what_the_files_are(compiled: Path, dense: Path) -> None:
    report = json.loads((compiled / "report.json").read_text())
    slim = AutoModelForCausalLM.from_pretrained(compiled)
    assert (
        report["before"]["parameters"]
        == 96 * 48 + 3 * (4 * 48 * 48 - 2 * 48 * 24 + 3 * 48 * 64 + 2 * 48) + 48
    )
    assert report["after"]["parameters"] == sum(p.numel() for p in slim.parameters())
    assert report["after"]["bytes"] == 4 * report["after"]["parameters"]
    assert report["kept"] == {"ffn": [144, 192], "kv_heads": [6, 9]}
    assert report["native"] is True
    assert report["source"] == str(dense)
    assert 0 <= report["max_abs_error"] < 1e-9
    for side in ("before", "after"):
        assert report[side]["torch"]["milliseconds"] > 0
        assert report[side]["onnxruntime"]["milliseconds"] > 0
        assert report[side]["perplexity"]["windows"] == 8


def test_compile_prints_a_table(
    run: Callable[..., Result], dense: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "slim.pt2"
    result = run("compile", dense, "-o", output, "--remove", "ffn=0.5", "--text", text)
    assert result.code == 0, result.err
    for words in ("parameters", "-25.9 %", "PyTorch, ms", "perplexity", f"written: {output}"):
        assert words in result.out
    assert "verifying ..." in result.err
    assert tree(output.parent) == [
        "slim.pt2",
        "slim.pt2.graphprune_plan.json",
        "slim.pt2.report.json",
    ]
    assert run("verify", output).code == 0


def test_json_is_nothing_but_json_and_a_dry_run_writes_nothing(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    result = run("compile", dense, "-o", output, "--target", "params=36912", "--dry-run", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["outputs"] == []
    assert report["after"]["parameters"] == 36_912
    assert tree(tmp_path) == []


def test_a_saved_plan_replays_to_the_same_bytes(
    run: Callable[..., Result], dense: Path, compiled: Path, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    plan = compiled / "graphprune_plan.json"
    result = run("compile", dense, "-o", output, "--plan", plan)
    assert result.code == 0, result.err
    again = (output / "model.safetensors").read_bytes()
    assert again == (compiled / "model.safetensors").read_bytes()


def test_a_recipe_with_flags(run: Callable[..., Result], dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("shape: {ffn: 32, kv_heads: 2}\nscore: random\n")
    found = run("compile", dense, recipe, "--dry-run", "--json", "--seed", 1)
    assert json.loads(found.out)["kept"] == {"ffn": [96, 192], "kv_heads": [6, 9]}
    flags = ("--shape", "ffn=48", "--align", 16, "--exclude", "model.layers.0.*")
    found = run("compile", dense, recipe, "--dry-run", "--json", *flags)
    assert json.loads(found.out)["kept"] == {"ffn": [64 + 2 * 48, 192]}


def test_rounds_reach_the_same_size(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("remove: {ffn: 0.5, layers: 1/3}\nrounds: 2\n")
    result = run("compile", dense, recipe, "--dry-run", "--json")
    assert result.code == 0, result.err
    kept = json.loads(result.out)["kept"]
    assert kept["layers"] == [2, 3]
    assert kept["ffn"] == [2 * 32, 192]


def test_taylor_takes_its_calibration_from_the_text(
    run: Callable[..., Result], dense: Path, text: Path
) -> None:
    flags = ("--remove", "ffn=0.5", "--score", "taylor", "--text", text, "--dry-run")
    result = run("compile", dense, *flags)
    assert result.code == 0, result.err
    assert "reading calibration text" in result.err


# --- what goes wrong


def check_failure(result: Result, *messages: str) -> None:
    """One message without a traceback, nothing on stdout."""
    assert result.code == 1
    assert result.out == ""
    for message in messages:
        assert message in result.err
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    assert "internal error" not in result.err


def compile_broken(
    run: Callable[..., Result], source: object, folder: Path, *flags: object
) -> Result:
    """Compile and check that nothing is left."""
    output = folder / "output" / "slim"
    flags = flags or ("--remove", "ffn=0.5")
    result = run("compile", source, "-o", output, *flags)
    assert not output.parent.exists() or tree(output.parent) == []
    return result


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


def test_overwriting_ones_own_output(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    output.mkdir()
    for name in ("graphprune_plan.json", "model.onnx"):
        (output / name).write_text("old")
    flags = ("--remove", "ffn=0.5", "--format", "pt2", "-o", output, "--overwrite")
    result = run("compile", dense, *flags)
    assert result.code == 0, result.err
    assert tree(tmp_path) == [
        "slim",
        "slim/graphprune_plan.json",
        "slim/model.pt2",
        "slim/report.json",
    ]


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

    monkeypatch.setattr("graphprune.compiler.verify", failing)
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


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", "from graphprune.cli import main; main()", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_interrupting_leaves_nothing(
    dense: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "output" / "slim"
    with running("compile", str(dense), "-o", str(output), "--remove", "ffn=0.5") as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("writing"):
                break
        time.sleep(0.2)
        child.send_signal(number)
        assert child.wait(timeout=60) == code
        assert "Traceback" not in child.stderr.read()
    assert tree(output.parent) == []


# --- inspect


def test_inspect_prints_structures_and_what_is_frozen(
    run: Callable[..., Result], dense: Path
) -> None:
    result = run("inspect", dense)
    assert result.code == 0, result.err
    assert "53,328 parameters" in result.out
    lines = {line.split()[0]: line for line in result.out.splitlines() if line}
    assert "model.layers.{0..2}.mlp" in lines["ffn"]
    assert lines["ffn"].split()[-3:-1] == ["64", "144"]
    assert {"hidden", "kv_heads", "layers"} <= lines.keys()
    assert "model.embed_tokens.weight:0" in result.out.partition("frozen:")[2]


def test_inspect_json(run: Callable[..., Result], dense: Path) -> None:
    data = json.loads(run("inspect", dense, "--json").out)
    assert (data["params"], data["bytes"]) == (53_328, 4 * 53_328)
    layers = [one for one in data["structures"] if one["role"] == "layers"]
    assert [one["size"] for one in layers] == [3]
    assert all(one["reason"] is None for one in data["structures"] if one["prunable"])


def test_inspect_why(run: Callable[..., Result], dense: Path) -> None:
    result = run("inspect", dense, "--why", "lm_head.weight")
    assert result.code == 0, result.err
    assert "frozen: indexed by values from outside" in result.out
    assert "prunable: hidden, 48 units" in result.out
    rows = json.loads(run("inspect", dense, "--why", "lm_head.weight", "--json").out)
    assert [row["size"] for row in rows] == [96, 48]
    check_failure(run("inspect", dense, "--why", "lm_head.wegt"), "did you mean 'lm_head.weight'?")


# --- verify and eval


def test_verify_from_the_files(run: Callable[..., Result], compiled: Path, dense: Path) -> None:
    for flags in ((), ("--source", dense)):
        result = run("verify", compiled, *flags, "--json")
        assert result.code == 0, result.err
        errors = json.loads(result.out)
        assert errors.keys() == {"slim", "model.pt2", "model.onnx"}
        assert errors["slim"] < 1e-9
        assert errors["model.pt2"] < 1e-9
        assert errors["model.onnx"] < 1e-3


def test_verify_notices_another_weight(
    run: Callable[..., Result], compiled: Path, tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01

    output = damaged(compiled, tmp_path, change)
    check_failure(run("verify", output), "does not compute")


def test_verify_without_what_it_needs(
    run: Callable[..., Result], dense: Path, compiled: Path, tmp_path: Path
) -> None:
    check_failure(run("verify", tmp_path / "none"), "no such output")
    check_failure(run("verify", dense), "plan")
    check_failure(run("verify", tmp_path), "holds no model")
    check_failure(run("verify", compiled, "--source", compiled), "doesn't belong")


def test_eval_equals_a_plain_computation(
    run: Callable[..., Result], dense: Path, compiled: Path, text: Path
) -> None:
    flags = ("--text", text, "--length", 32, "--windows", 5, "--json")
    result = run("eval", compiled, "--against", dense, *flags)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    ids = [LETTERS.index(letter) for letter in text.read_text()[: 5 * 32]]
    windows = torch.tensor(ids).view(5, 32)
    for path in (dense, compiled):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        with torch.no_grad():
            loss = model(input_ids=windows, labels=windows).loss.item()
        found = data[str(path)]
        assert found["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found["perplexity"]["windows"] == 5
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
        assert found["bytes"] == (path / "model.safetensors").stat().st_size


def test_eval_prints_a_table(run: Callable[..., Result], dense: Path, text: Path) -> None:
    result = run("eval", dense, "--text", text, "--length", 16, "--windows", 3)
    assert result.code == 0, result.err
    assert "perplexity: 3 windows of 16 tokens" in result.out
    assert "change" not in result.out


def test_eval_of_an_onnx_file(run: Callable[..., Result], compiled: Path) -> None:
    result = run("eval", compiled / "model.onnx", "--json")
    assert result.code == 0, result.err
    (found,) = json.loads(result.out).values()
    assert found["onnxruntime"]["milliseconds"] > 0
    assert found["bytes"] == (compiled / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"short", "too short"), (b"\xff\xfe", "not UTF-8")]
)
def test_eval_on_text_that_is_none(
    run: Callable[..., Result], dense: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    check_failure(run("eval", dense, "--text", path), message)
