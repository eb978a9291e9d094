"""SIGKILL and SIGTERM at every step of whole models: checkpoints, decoders, packed ones."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import graphprune as gp
from files.kills import Act, compiled, every_step, visible
from graphprune.emit import decoder, hf, onnx
from graphprune.packing import pack

pytestmark = pytest.mark.slow  # some five hundred processes, each of the size of this one

UNITS = {"older": range(0, 24), "newer": range(8, 32)}
FORMATS = {
    "checkpoint": ("slim", ["hf"]),
    "all": ("slim", ["hf", "pt2", "onnx", "onnx-decoder"]),
    "onnx": ("slim.onnx", ["onnx"]),
    "decoder": ("slim.onnx", ["onnx-decoder"]),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("models") / "dense"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def slims(dense: Path) -> dict[str, gp.Slim]:
    program = gp.load(dense)
    assert isinstance(program, gp.Program)
    (ffn,) = (s for s in program.structures if s.role == "ffn")
    return {
        name: gp.apply(
            program, gp.Plan(program.fingerprint, {ffn.name: tuple(units)}, {ffn.name: 32})
        )
        for name, units in UNITS.items()
    }


@pytest.fixture(scope="module")
def converted(slims: dict[str, gp.Slim], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the exporter makes of each, so that it isn't made anew in every process."""
    made: dict[tuple[str, str], Any] = {}
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        for name, slim in slims.items():
            for form, module in (("onnx", onnx), ("onnx-decoder", decoder)):
                real = module.convert

                def keep(*given: Any, real: Any = real, key: Any = (name, form)) -> Any:
                    made[key] = real(*given)
                    return made[key]

                patch.setattr(module, "convert", keep)
                slim.save(folder / f"{name}-{form}.onnx", form)  # type: ignore[arg-type]
                patch.undo()
    return made


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
@pytest.mark.parametrize("kind", FORMATS)
def test_compiled(
    slims: dict[str, gp.Slim],
    converted: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: int,
    overwrite: bool,
) -> None:
    torch.set_num_threads(1)
    name, formats = FORMATS[kind]
    monkeypatch.setattr(hf, "reopen", lambda *_, **__: [])  # which writes nothing
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(decoder, "tidy", lambda *_: None)  # it has been tidied
    for module in (onnx, decoder):
        monkeypatch.setattr(module, "EXTERNAL_ABOVE", 0)

    def make(version: str, output: Path) -> Act:
        write = compiled(slims[version], output, *formats)

        def act() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(onnx, "convert", lambda *_: converted[version, "onnx"])
                patch.setattr(decoder, "convert", lambda *_: converted[version, "onnx-decoder"])
                write()

        return act

    assert every_step(make, name, tmp_path, number, overwrite, every=3) >= 20
    make("newer", tmp_path / "folder" / name)()
    if "hf" in formats:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder" / name)
        assert model.config.intermediate_size == 24
    elif kind == "decoder":
        gp.runtime.session(tmp_path / "folder" / name)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
@pytest.mark.parametrize("kind", ["checkpoint", "onnx", "onnx with data"])
def test_packed(
    dense: Path,
    slims: dict[str, gp.Slim],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: int,
    overwrite: bool,
) -> None:
    torch.set_num_threads(1)
    sources = {}
    for version, limit in (("older", 0.01), ("newer", 0.02)):
        folder = tmp_path / version
        shutil.copytree(dense, folder)
        state = load_file(folder / "model.safetensors")
        state = {n: torch.where(t.abs() < limit, 0, t) for n, t in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        sources[version] = folder
        if kind != "checkpoint":
            program = gp.load(folder)
            sources[version] = tmp_path / f"{version}.onnx"
            gp.apply(program, gp.Plan(program.fingerprint, {})).save(sources[version], "onnx")
    if kind == "onnx with data":
        monkeypatch.setattr("graphprune.packing.onnx.EXTERNAL_ABOVE", 100)

    def make(version: str, output: Path) -> Act:
        return lambda: pack(sources[version], output, overwrite=True)

    name = "packed" if kind == "checkpoint" else "packed.onnx"
    assert every_step(make, name, tmp_path, number, overwrite, every=3) >= 10
    assert visible(tmp_path / "folder")
