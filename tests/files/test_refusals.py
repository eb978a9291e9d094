"""What a disk refuses to take, and sources that change while they are read."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphprune as gp
from files.kills import attempt
from files.small import RECIPE, TEXT, at
from graphprune.files import replacing, write_text
from graphprune.frontends import load_traced
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx import files as onnx_files
from graphprune.packing import pack
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, weights

# Disks that are full


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(60, 160), nn.Linear(160, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    "kind", ["text", "pt2", "onnx", "onnx with data", "hf", "pack", "pack onnx"]
)
def test_a_file_that_can_t_be_written_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The system refuses more than some bytes a file, in a process of its own."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    output = (
        tmp_path
        / "out"
        / ("slim.onnx" if "onnx" in kind else "slim.pt2" if kind == "pt2" else "slim")
    )
    write: Callable[[], object]
    if kind == "text":
        write = lambda: write_text(output, "x" * 10_000)  # noqa: E731
    elif kind == "pt2":
        program = gp.trace(Net().eval(), (torch.randn(2, 60),))
        slim = gp.apply(program, gp.Plan(program.fingerprint, {}))
        write = lambda: slim.save(output, "pt2")  # noqa: E731
    elif kind == "hf":
        program = load_traced(checkpoint)
        slim = gp.apply(program, gp.Plan(program.fingerprint, {}))
        write = lambda: slim.save(output, "hf")  # noqa: E731
    elif kind == "pack":
        write = lambda: pack(checkpoint, output)  # noqa: E731
    else:
        file = tmp_path / "dense.onnx"
        matrix = weights(20, 1600)
        matrix[np.abs(matrix) < 0.5] = 0
        onnx.save(graph(TEXT, a=matrix, c=weights(1600, 3)), file)
        if kind == "pack onnx":
            write = lambda: pack(file, output)  # noqa: E731
        else:
            if "data" in kind:
                monkeypatch.setattr(onnx_files, "EXTERNAL_ABOVE", 100)
            slim_onnx = load_onnx(file)
            plan = gp.Plan(slim_onnx.fingerprint, {})
            write = lambda: SlimOnnx(slim_onnx, plan).save(output)  # noqa: E731

    def refused() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        with pytest.raises(gp.EmitError, match="can't write the output") as caught:
            write()
        assert caught.value.why == "File too large"
        assert "free some disk space" in str(caught.value)

    assert attempt(refused, tmp_path).status == 0
    assert not output.parent.exists()


def test_too_little_space_is_said_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    usage = shutil.disk_usage(tmp_path)._replace(free=500)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(gp.EmitError, match="too little space") as caught:
        gp.compile(source, RECIPE, tmp_path / "out" / "slim.onnx", progress=said.append)
    assert "0.0 MB are free" in str(caught.value)
    assert "verifying" not in said
    assert not (tmp_path / "out").exists()


# Sources that change


def test_a_checkpoint_that_is_cut_short_while_it_is_read(checkpoint: Path, tmp_path: Path) -> None:
    """Its weights are mapped, and pages that are gone would end the process."""
    dense = tmp_path / "dense"
    shutil.copytree(checkpoint, dense)
    file, output = dense / "model.safetensors", tmp_path / "out" / "slim"
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude", "formats": ["pt2"]}

    def compile() -> None:
        cut = at("checking weights", lambda: os.truncate(file, 4096))
        with pytest.raises(gp.LoadError, match="changed while it was read") as caught:
            gp.compile(dense, recipe, output, progress=cut)
        assert caught.value.where == str(file)
        assert "to 4,096 bytes" in str(caught.value.why)

    assert attempt(compile, tmp_path).status == 0
    assert not output.parent.exists()


@pytest.mark.parametrize("change", ["written to", "replaced", "gone"])
def test_a_source_that_is_another_in_the_end(source: Path, tmp_path: Path, change: str) -> None:
    data = source.read_bytes()
    changes: dict[str, Callable[[], object]] = {
        "written to": lambda: source.write_bytes(data),
        "replaced": lambda: (
            source.with_name("x").write_bytes(data),
            source.with_name("x").replace(source),
        ),
        "gone": source.unlink,
    }
    output = tmp_path / "out" / "slim.onnx"
    with pytest.raises(gp.LoadError, match="changed while it was read"):
        gp.compile(source, RECIPE, output, progress=at("verifying", changes[change]))
    assert not output.parent.exists()


def test_pack_notices_too(checkpoint: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(checkpoint, dense)
    file = dense / "model.safetensors"
    state = {n: t * 2 for n, t in load_file(file).items()}

    def save() -> None:
        save_file(state, tmp_path / "other", {"format": "pt"})
        (tmp_path / "other").replace(file)

    with pytest.raises(gp.LoadError, match="changed while it was read"):
        pack(dense, tmp_path / "out" / "packed", progress=at("writing", save))
    assert not (tmp_path / "out").exists()


def test_replacing_is_for_links_too(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "one")
    write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "two"
    with pytest.raises(gp.EmitError), replacing(tmp_path / "file" / "below") as file:
        file.touch()
