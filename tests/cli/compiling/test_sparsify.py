"""`graphprune compile --sparsify`: what it writes, what it says, and that it can be interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import graphprune.cli.progress
import graphprune.pipeline.checking
import graphprune.pipeline.compiler
from cli.helpers import CYCLE, LETTERS, Result, check_failure, teach, tree
from graphprune.errors import VerifyError
from plan_files import units

ROOT = Path(__file__).parents[3]
LINEARS = [
    f"self_attn.{n}_proj" for n in "qkvo"
] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]  # fmt: skip


@pytest.fixture(scope="module")
def taught(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that have learnt a text."""
    return teach(dense, tmp_path_factory.mktemp("taught") / "taught", layers=2)


@pytest.fixture
def recipe(tmp_path: Path, cycles: Path) -> Callable[[str], Path]:
    """A recipe's file with the text that the model knows."""

    def write(body: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"{body}\ncalibration: {{data: {cycles}, general: 0, windows: 6, length: 16}}\n"
        )
        return path

    return write


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from graphprune.cli.app import main; main()"]
    with subprocess.Popen(
        [*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def linears(layers: range) -> list[str]:
    return [f"model.layers.{i}.{name}.weight" for i in layers for name in LINEARS]


# A reference has all that is kept without one, and its own activations beside it.
@pytest.mark.parametrize("reference", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    run: Callable[..., Result],
    taught: Path,
    tmp_path: Path,
    recipe: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    reference: str,
) -> None:
    file = recipe(f"sparsify: {{method: sparsegpt, sparsity: 50%, reference: {reference}}}")
    folder = tmp_path / "output"
    output, state = folder / "slim", folder / ".slim.state"
    command = ("compile", taught, file, "-o", output)
    with running(*command) as child:
        assert child.stderr is not None
        while len(list(state.glob("*/group-*.safetensors"))) < 5 and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        said = child.stderr.read()
        assert child.wait(timeout=60) == 143
    assert "run again with --resume" in said
    assert str(state) in said
    assert "Traceback" not in said
    assert "writing" not in said
    assert tree(folder)[0] == ".slim.state"
    assert all(name.startswith(".slim.state") for name in tree(folder))

    (manifest,) = state.rglob("manifest.json")
    progress = json.loads(manifest.read_text())
    done, after = progress["done"], progress["activations"] + 1
    assert 4 <= done < 8  # by when the signal came

    monkeypatch.setattr(graphprune.cli.progress, "MINUTE", 0)
    result = run(*command, "--resume", "--json")
    assert result.code == 0, result.err
    # The run begins behind the activations that were saved last.
    assert result.err.count("as before, ") == done - after
    assert "group 1 of 8" not in result.err
    assert "group 8 of 8" in result.err
    assert not state.exists()
    resumed = json.loads(result.out)

    whole = run("compile", taught, file, "-o", tmp_path / "whole", "--json")
    assert whole.code == 0, whole.err
    assert "group 1 of 8" in whole.err
    assert resumed["masks"] == json.loads(whole.out)["masks"]
    names = tree(tmp_path / "whole")
    assert tree(output) == names
    for name in names:
        if name not in ("report.json", "report.html"):  # which have times
            assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

    written = AutoModelForCausalLM.from_pretrained(output).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(taught).state_dict().items():
        if name in linears(range(2)):
            assert int((written[name] == 0).sum()) == tensor.numel() // 2
            assert not torch.equal(written[name], torch.where(written[name] == 0, 0, tensor))
        else:
            assert torch.equal(written[name], tensor)
    masks = resumed["masks"]
    assert [e["parameter"] for e in masks["layers"]] == linears(range(2))
    assert masks["sparsity"] == 0.5
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(taught).parameters())
    removed = sum(e["zeros"] for e in masks["layers"])
    assert masks["sparsity_of_model"] == removed / total
    assert masks["checked"] == {"hf": removed}
    assert all(0 < e["error"] < 1 for e in masks["layers"])
    assert resumed["before"]["perplexity"]["value"] < 3 < 96
    assert resumed["after"]["perplexity"]["value"] > resumed["before"]["perplexity"]["value"]


def test_later_layers_make_up_for_zeros_on_request(
    run: Callable[..., Result], taught: Path, tmp_path: Path, cycles: Path
) -> None:
    flags = ("--sparsify", "alps", "--sparsity", "70%", "--data", cycles)
    tokenizer = AutoTokenizer.from_pretrained(taught)
    ids = tokenizer(CYCLE * 4, return_tensors="pt", add_special_tokens=False)["input_ids"]
    far: list[float] = []
    for more in ((), ("--reference",)):
        output = tmp_path / str(len(far))
        result = run("compile", taught, "-o", output, *flags, *more)
        assert result.code == 0, result.err
        assert ("the gap to the dense model closed" in result.out) == bool(more)
        with torch.no_grad():
            wanted, found = (
                AutoModelForCausalLM.from_pretrained(m)(ids).logits for m in (taught, output)
            )
        far.append(float((found - wanted).square().mean()))
        assert run("verify", output).code == 0
    assert far[1] < far[0]


def test_structures_go_first_and_then_weights_in_every_format(
    run: Callable[..., Result], taught: Path, tmp_path: Path, recipe: Callable[[str], Path]
) -> None:
    file = recipe(
        "remove: {ffn: 0.25, layers: 1/2}\nscore: random\n"
        'sparsify: {method: sparsegpt, pattern: "2:4", bits: 4, exclude: "*.o_proj.*"}'
    )
    output = tmp_path / "slim"
    formats = ("--format", "pt2", "--format", "onnx")
    result = run("compile", taught, file, "-o", output, *formats)
    assert result.code == 0, result.err
    assert tree(tmp_path) == [
        "recipe.yaml",
        "slim",
        "slim/graphprune_plan.json",
        "slim/model.onnx",
        "slim/model.pt2",
        "slim/recipe.yaml",
        "slim/report.html",
        "slim/report.json",
    ]
    report = json.loads((output / "report.json").read_text())
    plan = json.loads((output / "graphprune_plan.json").read_text())
    (layer,) = units(plan["structures"]["model.layers"]["kept"])
    treated = [name for name in linears(range(1)) if "o_proj" not in name]
    assert [e["parameter"] for e in report["masks"]["layers"]] == treated
    assert report["masks"]["skipped"]["model.layers.0.self_attn.o_proj.weight"] == "excluded"

    exported = torch.export.load(output / "model.pt2")
    state, dense = exported.state_dict, load_file(taught / "model.safetensors")
    zeros = 0
    for name in treated:
        groups = state[name].reshape(-1, 4)
        assert bool(((groups != 0).sum(1) <= 2).all())
        assert all(len(row.unique()) <= 2**4 for row in state[name])
        zeros += int((groups == 0).sum())
    for name in state.keys() - set(treated) - {"lm_head.weight"}:
        assert torch.equal(state[name], dense[name.replace(".0.", f".{layer}.")])
    assert report["masks"]["checked"] == {"pt2": zeros, "onnx": zeros}
    stored = [numpy_helper.to_array(t) for t in onnx.load(output / "model.onnx").graph.initializer]
    found = sum(int((a == 0).sum()) for a in stored if a.dtype == np.float32 and a.ndim == 2)
    assert found == zeros

    ids = torch.tensor([[LETTERS.index(letter) for letter in CYCLE * 2]])
    expected = exported.module()(input_ids=ids).logits.detach().numpy()
    session = onnxruntime.InferenceSession(output / "model.onnx")
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    for words in ("2 kept of every 4", "rounded to 4 bits", "of the whole model", "left alone"):
        assert words in result.out

    again = ("--plan", output / "graphprune_plan.json", "--sparsify", "ria", "--sparsity", "0.5")
    replayed = json.loads(run("compile", taught, *again, "--dry-run", "--json").out)
    shapes = {e["parameter"]: e["shape"] for e in replayed["masks"]["layers"]}
    assert shapes == {n: [*state[n].shape] for n in linears(range(1))}

    verified = run("verify", output, "--json")
    assert verified.code == 0, verified.err
    assert set(json.loads(verified.out)) == {"model.pt2", "model.onnx"}
    model = onnx.load(output / "model.onnx")
    place = report["masks"]["places"]["onnx"][treated[0]].removesuffix("^T")
    tensor = next(t for t in model.graph.initializer if t.name == place)
    values = numpy_helper.to_array(tensor).copy()
    values[tuple(np.argwhere(values == 0)[0])] = 1e-3
    tensor.CopyFrom(numpy_helper.from_array(values, place))
    onnx.save(model, output / "model.onnx")
    check_failure(run("verify", output), "other zeros than the report says")


def test_magnitude_needs_no_data_and_leaves_the_rest_of_the_weights(
    run: Callable[..., Result], taught: Path, tmp_path: Path
) -> None:
    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(taught / name, mute / name)
    output = tmp_path / "slim.pt2"
    flags = ("--sparsify", "magnitude", "--sparsity", "30%", "--budget", "global")
    result = run("compile", mute, "-o", output, *flags, "--exclude", "*.1.*")
    assert result.code == 0, result.err
    state, dense = torch.export.load(output).state_dict, load_file(mute / "model.safetensors")
    sizes = np.concatenate([dense[n].abs().flatten().numpy() for n in linears(range(1))])
    threshold = np.sort(sizes)[round(0.3 * len(sizes)) - 1]
    for name in linears(range(1)):
        kept = dense[name].abs() > float(threshold)
        assert torch.equal(state[name], torch.where(kept, dense[name], 0))
    for name in linears(range(1, 2)):
        assert torch.equal(state[name], dense[name])


def test_onnx_models_are_masked_on_arrays(run: Callable[..., Result], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 3)]
    module = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()
    source, data = tmp_path / "dense.onnx", torch.randn(65, 12)
    torch.onnx.export(module, (data[:2],), source, dynamo=True, verbose=False)
    np.savez(tmp_path / "data.npz", data.numpy())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sparsify: {method: sparsegpt, sparsity: 0.5}\n"
        f"calibration: {{data: {tmp_path / 'data.npz'}, windows: 65, draw: first}}\n"
    )
    output = tmp_path / "out" / "sparse.onnx"
    result = run("compile", source, recipe, "-o", output, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    masks = report["masks"]
    assert "the model takes 2 samples at a time: the last 1 are left out" in report["notes"]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(output).graph.initializer}
    rows = data[:64].double()
    for layer, name in zip(layers, ("0.weight", "2.weight"), strict=False):
        (place,) = [e for e in masks["layers"] if e["parameter"] == name]
        new = torch.from_numpy(stored[name].copy())
        dense = layer.weight.detach()
        assert int((new == 0).sum()) == place["zeros"] == dense.numel() // 2
        lost = (rows @ (new - dense).double().T).square().sum()
        error = float(lost / (rows @ dense.double().T).square().sum())
        assert place["error"] == pytest.approx(error, rel=1e-3)
        rows = torch.relu(rows @ new.double().T + layer.bias.detach().double())
    expected = rows @ layers[2].weight.double().T + layers[2].bias.double()
    session = onnxruntime.InferenceSession(output)
    feed = {session.get_inputs()[0].name: data[:2].numpy()}
    (found,) = session.run(None, feed)
    np.testing.assert_allclose(found, expected[:2].detach(), rtol=1e-4, atol=1e-5)
    assert run("verify", output).code == 0


def test_onnx_models_are_cut_and_masked(run: Callable[..., Result], tmp_path: Path) -> None:
    """In one run as in two."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    source, data = tmp_path / "dense.onnx", torch.randn(64, 12)
    torch.onnx.export(module.eval(), (data[:2],), source, dynamo=True, verbose=False)
    np.savez(tmp_path / "data.npz", data.numpy())
    whole, half, recipe = (tmp_path / f"{n}.yaml" for n in ("whole", "half", "recipe"))
    both, first, then = (tmp_path / f"{n}.onnx" for n in ("both", "first", "then"))
    masks = (
        "sparsify: {method: sparsegpt, sparsity: 0.5, exclude: [4.*]}\n"
        f"calibration: {{data: {tmp_path / 'data.npz'}, windows: 64, draw: first}}\n"
    )
    whole.write_text(masks + "remove: {'*': 0.25}\nscore: magnitude\nrepair: none\n")
    half.write_text(masks)
    recipe.write_text("remove: {'*': 0.25}\nscore: magnitude\n")
    done = run("compile", source, whole, "-o", both, "--json")
    assert done.code == 0, done.err
    assert run("compile", source, recipe, "-o", first).code == 0
    assert run("compile", first, half, "-o", then).code == 0
    found, wanted = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer}
        for p in (both, then)
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    layers = {e["parameter"]: e for e in json.loads(done.out)["masks"]["layers"]}
    shapes = {"0.weight": [12, 12], "2.weight": [6, 12]}
    assert {name: e["shape"] for name, e in layers.items()} == shapes
    for name in shapes:
        assert int((found[name] == 0).sum()) == layers[name]["zeros"] == found[name].size // 2
    assert run("verify", both).code == 0
    dry = json.loads(run("compile", source, whole, "--dry-run", "--json").out)["masks"]["layers"]
    assert {e["parameter"]: e["shape"] for e in dry} == shapes


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("narrower", [False, True])
def test_reordered_channels_are_written_and_verified(
    run: Callable[..., Result], tmp_path: Path, narrower: bool
) -> None:
    torch.manual_seed(1)
    module, data = nn.Sequential(Wide(), Wide(), nn.Linear(8, 3)).eval(), torch.randn(64, 8)
    source, output, recipe = tmp_path / "dense.pt2", tmp_path / "out", tmp_path / "recipe.yaml"
    batch = torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(module, (data,), dynamic_shapes=({0: batch},)), source)
    np.savez(tmp_path / "data.npz", data.numpy())
    recipe.write_text(
        "sparsify: {method: ria, pattern: '2:4', permute: true, exclude: ['*.up.weight']}\n"
        f"calibration: {{data: {tmp_path / 'data.npz'}, windows: 64, draw: first}}\n"
        + ("remove: {ffn: 0.25}\nscore: magnitude\nrepair: none\n" if narrower else "")
    )
    formats = ["--format", "pt2", "--format", "onnx"]
    result = run("compile", source, recipe, "-o", output, *formats, "--json")
    assert result.code == 0, result.err
    masks = json.loads(result.out)["masks"]
    assert masks["reordered"] == [f"{i}.up.{part}" for i in range(2) for part in ("weight", "bias")]
    layers = {e["parameter"]: e for e in masks["layers"]}
    assert masks["checked"] == dict.fromkeys(
        ("pt2", "onnx"), sum(e["zeros"] for e in layers.values())
    )
    state = torch.export.load(output / "model.pt2").state_dict
    width = 12 if narrower else 16
    for i in range(2):
        assert any("reordered" in note for note in layers[f"{i}.down.weight"]["notes"])
        down = state[f"{i}.down.weight"]
        assert down.shape == (8, width)
        assert bool(((down != 0).reshape(8, -1, 4).sum(-1) == 2).all())
        dense = {n: p.detach() for n, p in module.get_submodule(str(i)).named_parameters()}
        rows = [int((dense["up.bias"] == value).nonzero()) for value in state[f"{i}.up.bias"]]
        assert torch.equal(state[f"{i}.up.weight"], dense["up.weight"][rows])
        assert torch.equal(down, torch.where(down != 0, dense["down.weight"][:, rows], 0))
        assert rows != sorted(rows)
    assert run("verify", output).code == 0


def test_channels_of_onnx_models_are_reordered(run: Callable[..., Result], tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, data = nn.Sequential(Wide(), nn.Linear(8, 3)).eval(), torch.randn(64, 8)
    source, output, recipe = (tmp_path / n for n in ("dense.onnx", "sparse.onnx", "recipe.yaml"))
    torch.onnx.export(module, (data[:2],), source, dynamo=True, verbose=False)
    np.savez(tmp_path / "data.npz", data.numpy())
    recipe.write_text(
        "sparsify: {method: ria, pattern: '2:4', permute: true, include: ['*.down.weight']}\n"
        f"calibration: {{data: {tmp_path / 'data.npz'}, windows: 64, draw: first}}\n"
    )
    result = run("compile", source, recipe, "-o", output, "--json")
    assert result.code == 0, result.err
    masks = json.loads(result.out)["masks"]
    assert masks["reordered"] == ["0.up.weight", "0.up.bias"]
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer}
        for p in (source, output)
    )
    rows = [int(np.flatnonzero(before["0.up.bias"] == v)[0]) for v in after["0.up.bias"]]
    assert rows != sorted(rows)
    np.testing.assert_array_equal(after["0.up.weight"], before["0.up.weight"][rows])
    down = after["0.down.weight"]
    assert ((down != 0).reshape(8, -1, 4).sum(-1) == 2).all()
    np.testing.assert_array_equal(down, np.where(down != 0, before["0.down.weight"][:, rows], 0))
    assert run("verify", output).code == 0


def test_a_dry_run_lists_what_would_be_treated(
    run: Callable[..., Result], taught: Path, tmp_path: Path
) -> None:
    flags = [
        *("--sparsify", "wanda", "--pattern", "1:4", "--remove", "ffn=0.5", "--score", "random"),
        "--dry-run",
    ]
    result = run("compile", taught, *flags, "--json")
    assert result.code == 0, result.err
    masks = json.loads(result.out)["masks"]
    shapes = {e["parameter"]: e["shape"] for e in masks["layers"]}
    assert list(shapes) == linears(range(2))
    assert shapes["model.layers.0.mlp.down_proj.weight"] == [48, 32]
    assert {e["target"] for e in masks["layers"]} == {0.75}
    assert {e["sparsity"] for e in masks["layers"]} == {None}
    assert "embedding" in masks["skipped"]["model.embed_tokens.weight"]
    shown = run("compile", taught, *flags).out
    assert "to be treated: 14 parameters" in shown
    assert "48 x 32" in shown


def test_a_failure_keeps_what_was_done_for_the_same_run(
    run: Callable[..., Result],
    taught: Path,
    tmp_path: Path,
    recipe: Callable[[str], Path],
    cycles: Path,
) -> None:
    file = recipe("sparsify: {method: wanda, sparsity: 0.5, budget: owl}")
    model = shutil.copytree(taught, tmp_path / "model")
    command = ("compile", model, file, "-o", tmp_path / "out" / "slim.pt2")

    def broken(*_: object, **__: object) -> None:
        raise VerifyError("the model is not what it should be")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphprune.pipeline.checking, "verify", broken)
        result = run(*command)
    check_failure(result, "not what it should be", "8 groups are done", "--resume")
    assert "looking for the layers' budgets: group 8 of 8" in result.err
    assert "pruning weights: group 8 of 8" in result.err

    before = tree(tmp_path / "out")
    result = run(*command)
    check_failure(result, "an interrupted run has left its progress here", "--overwrite")
    result = run(*command, "--resume", "--sparsity", "60%")
    check_failure(result, "sparsify.sparsity was 0.5, and is 0.6")
    text = cycles.read_text()
    cycles.write_text(text[1:])
    check_failure(run(*command, "--resume"), "the samples are others")
    cycles.write_text(text)
    weights = load_file(model / "model.safetensors")
    norm = {"model.norm.weight": weights["model.norm.weight"] + 1e-3}
    save_file({**weights, **norm}, model / "model.safetensors", metadata={"format": "pt"})
    check_failure(run(*command, "--resume"), "the model has other weights")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert tree(tmp_path / "out") == before

    result = run(*command, "--resume", "--json")
    assert result.code == 0, result.err
    masks = json.loads(result.out)["masks"]
    assert len({e["target"] for e in masks["layers"]}) > 1
    assert abs(masks["sparsity"] - 0.5) < 1e-3
    assert tree(tmp_path / "out") == [
        "slim.pt2",
        "slim.pt2.graphprune_plan.json",
        "slim.pt2.recipe.yaml",
        "slim.pt2.report.html",
        "slim.pt2.report.json",
    ]
