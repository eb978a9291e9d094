"""Where outputs may go, and who else may be there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphprune as gp
from files.kills import hidden, visible
from files.small import RECIPE, at, run
from graphprune.files import claimed, placing, recover, write_text
from graphprune.files.moves import move_new
from graphprune.packing import pack

# Others at the same place


@pytest.mark.parametrize("name", ["slim", "slim.onnx"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_appears_while_compile_runs_stays(
    source: Path, tmp_path: Path, name: str, kind: str
) -> None:
    output = tmp_path / "out" / name

    def appear() -> None:
        if kind == "directory":
            output.mkdir()
        (output / "mine" if kind == "directory" else output).write_text("mine")

    with pytest.raises(gp.EmitError) as caught:
        gp.compile(source, RECIPE, output, progress=at("putting", appear))
    assert str(output) in str(caught.value)
    file = output / "mine" if kind == "directory" else output
    assert file.read_text() == "mine"
    assert visible(tmp_path / "out").keys() == {str(file.relative_to(tmp_path / "out"))}
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["slim", "slim.onnx"])
def test_what_takes_the_place_of_an_older_output_stays(
    source: Path, tmp_path: Path, name: str
) -> None:
    """Leave was given to replace the older one."""
    output = tmp_path / "out" / name
    gp.compile(source, RECIPE, output)

    def exchange() -> None:
        output.rename(tmp_path / "older")
        if name == "slim":
            output.mkdir()
        (output / "mine" if name == "slim" else output).write_text("mine")

    with pytest.raises(gp.EmitError, match="the output exists"):
        gp.compile(source, RECIPE, output, overwrite=True, progress=at("putting", exchange))
    assert (output / "mine" if name == "slim" else output).read_text() == "mine"
    assert hidden(tmp_path) == []


def test_an_older_output_that_is_gone_by_then_needs_no_leave(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "slim.onnx"
    gp.compile(source, RECIPE, output)
    wanted = run(output)
    gp.compile(source, RECIPE, output, overwrite=True, progress=at("putting", output.unlink))
    assert np.array_equal(run(output), wanted)


@pytest.mark.parametrize("name", ["slim", "slim.onnx"])
def test_of_two_runs_the_second_is_refused_before_it_works(
    source: Path, tmp_path: Path, name: str
) -> None:
    said: list[str] = []
    output = tmp_path / name

    def second() -> None:
        with pytest.raises(gp.EmitError, match="another run is writing here"):
            gp.compile(source, RECIPE, output, overwrite=True, progress=said.append)

    gp.compile(source, RECIPE, output, progress=at("verifying", second))
    assert said == []
    assert run(output / "model.onnx" if name == "slim" else output).shape == (2, 3)
    assert hidden(tmp_path) == []


def test_a_lock_ends_with_its_process(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "slim.onnx"
    code = (
        "import sys, time; from pathlib import Path; from graphprune.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write_bytes(bytes(100_000)); print('there', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, output], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        with pytest.raises(gp.EmitError, match="another run is writing here"):
            gp.compile(source, RECIPE, output)
        child.kill()
    assert hidden(tmp_path) == [
        ".slim.onnx.writing",
        ".slim.onnx.writing/lock",
        ".slim.onnx.writing/new",
        ".slim.onnx.writing/new/slim.onnx",
    ]
    gp.compile(source, RECIPE, output)
    assert hidden(tmp_path) == []
    assert run(output).shape == (2, 3)


def test_without_locks_each_run_has_a_folder_of_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems: the one that ends first has the place."""

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("graphprune.files.locks.fcntl.flock", refuse)
    output = tmp_path / "slim.onnx"

    def first() -> None:
        gp.compile(source, RECIPE, output)

    with pytest.raises(gp.EmitError, match="the output exists"):
        gp.compile(source, RECIPE, output, progress=at("verifying", first))
    assert run(output).shape == (2, 3)
    assert hidden(tmp_path) == []


def test_what_is_put_right_replaces_nothing(tmp_path: Path) -> None:
    """A process died after it had set a plan aside; somebody has made another one since."""
    holder = tmp_path / ".slim.onnx.writing"
    for name in ("new/slim.onnx", "new/slim.onnx.plan", "old/slim.onnx.plan", "old/slim.onnx.b"):
        (holder / name).parent.mkdir(parents=True, exist_ok=True)
        (holder / name).write_text(name)
    (tmp_path / "slim.onnx").write_text("mine")
    (tmp_path / "slim.onnx.plan").write_text("mine")
    recover(tmp_path / "slim.onnx")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "slim.onnx": "mine",
        "slim.onnx.plan": "mine",
        "slim.onnx.b": "old/slim.onnx.b",
    }


def test_a_signal_waits_for_the_last_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(list(tmp_path.iterdir())))

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == []

    monkeypatch.setattr("graphprune.files.placing.move_new", kill)
    try:
        write_text(tmp_path / "a", "a")
        assert len(came) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(came) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_refuses_one_of_the_last_moves(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Those before it are undone."""
    output = tmp_path / "out" / "slim.onnx"
    if overwrite:
        gp.compile(beside, RECIPE, output)
    before = visible(tmp_path)
    moves = ["link", "replace", "rename"]
    real = {name: getattr(os, name) for name in moves} | {"new": move_new}
    refused = 0
    for step in range(20):
        left = [step]

        def move(*given: Any, how: str, left: list[int] = left, **options: Any) -> Any:
            left[0] -= any("slim.onnx" in str(path) for path in given)
            if left[0] == -1:
                left[0] = -2  # what is undone works
                raise OSError(28, os.strerror(28))
            return real[how](*given, **options)

        with monkeypatch.context() as patch:
            for name in moves:
                patch.setattr(os, name, partial(move, how=name))
            patch.setattr(placing, "move_new", partial(move, how="new"))
            try:
                gp.compile(beside, {"remove": {"*": 0.25}}, output, overwrite=True)
            except gp.EmitError as error:
                refused += error.why == "No space left on device"
            else:
                break
        assert visible(tmp_path) == before
        assert hidden(tmp_path) == []
    assert refused >= 4
    # The graph, its weights, the plan, the recipe, the report and its page.
    assert len(visible(tmp_path / "out")) == 6


# Second files


def test_models_find_the_weights_that_they_were_written_with(beside: Path, tmp_path: Path) -> None:
    """A copy of the older model goes on with its data; what nobody refers to any more goes."""
    output, copy = tmp_path / "out" / "slim.onnx", tmp_path / "out" / "copy.onnx"
    gp.compile(beside, RECIPE, output)
    wanted = run(output)
    shutil.copy(output, copy)
    gp.compile(beside, {"remove": {"*": 0.25}}, output, overwrite=True)
    assert not np.array_equal(run(output), wanted)
    assert np.array_equal(run(copy), wanted)
    assert len(list((tmp_path / "out").glob("*.data"))) == 2
    copy.unlink()
    (tmp_path / "out" / "slim.onnx.0123456789ab.data").write_text("somebody's")
    gp.compile(beside, RECIPE, output, overwrite=True)
    assert np.array_equal(run(output), wanted)
    assert len(list((tmp_path / "out").glob("*.data"))) == 2
    assert (tmp_path / "out" / "slim.onnx.0123456789ab.data").read_text() == "somebody's"


# Places


@pytest.mark.parametrize("there", [False, True], ids=["dangling", "empty"])
def test_a_link_to_a_directory_is_followed(source: Path, tmp_path: Path, there: bool) -> None:
    link, place = tmp_path / "link", tmp_path / "elsewhere" / "slim"
    link.symlink_to("elsewhere/slim")
    if there:
        place.mkdir(parents=True)
    for overwrite in (False, True):
        report = gp.compile(source, RECIPE, link, overwrite=overwrite)
        assert report.outputs == (str(link / "model.onnx"),)
        assert link.is_symlink()
        assert run(place / "model.onnx").shape == (2, 3)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("target", ["slim.onnx", "none.onnx", "link.onnx"])
def test_a_link_to_a_file_is_refused_before_any_work(
    source: Path, tmp_path: Path, target: str
) -> None:
    (tmp_path / "slim.onnx").write_text("mine")
    said: list[str] = []
    link = tmp_path / "link.onnx"
    link.symlink_to(target)
    for write in (
        lambda: gp.compile(source, RECIPE, link, overwrite=True, progress=said.append),
        lambda: pack(source, link, overwrite=True, progress=said.append),
    ):
        with pytest.raises(gp.EmitError, match="symbolic link"):
            write()
    assert said == []
    assert (tmp_path / "slim.onnx").read_text() == "mine"


def test_outputs_and_sources_lie_apart(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    dense = tmp_path / "models" / "dense"
    shutil.copytree(checkpoint, dense)
    (tmp_path / "link").symlink_to("models")
    (tmp_path / "models" / "graphprune_plan.json").touch()  # as if it were an older output
    before = visible(tmp_path)
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude"}
    for output, message in (
        (dense / "slim", "lies inside the source"),
        (dense / "slim.pt2", "lies inside the source"),
        (tmp_path / "link" / "dense" / "slim", "lies inside the source"),
        (dense / ".." / "dense", "would replace the source"),
        (tmp_path / "models", "would replace the source"),
        (tmp_path / "link", "would replace the source"),
    ):
        with pytest.raises(gp.EmitError, match=message):
            gp.compile(dense, recipe, output, overwrite=True, progress=said.append)
    for output in (dense / "packed", tmp_path / "models", tmp_path / "link" / "dense" / "packed"):
        with pytest.raises(gp.EmitError, match="lie in one another"):
            pack(dense, output, overwrite=True, progress=said.append)
    assert said == []
    assert visible(tmp_path) == before
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("kind", ["recipe", "plan", "text"])
def test_nothing_that_a_run_reads_is_replaced(source: Path, tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    output = tmp_path / "slim"
    gp.compile(source, RECIPE, output)
    (output / "recipe.yaml").write_text("remove: {'*': 0.5}\n")
    (output / "text.txt").write_text("text")
    recipes: dict[str, Any] = {
        "recipe": output / "recipe.yaml",
        "plan": {"plan": str(output / "graphprune_plan.json")},
        "text": {**RECIPE, "calibration": {"text": str(output / "text.txt")}},
    }
    before = visible(tmp_path)
    with pytest.raises(gp.EmitError, match=f"would replace the {kind}"):
        gp.compile(source, recipes[kind], output, overwrite=True, progress=said.append)
    assert said == []
    assert visible(tmp_path) == before


def test_a_plan_beside_an_output_is_not_replaced_while_it_is_read(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim.onnx"
    gp.compile(source, RECIPE, output)
    plan = tmp_path / "slim.onnx.graphprune_plan.json"
    with pytest.raises(gp.EmitError, match="would replace the plan"):
        gp.compile(source, {"plan": str(plan)}, output, overwrite=True)
    output.unlink()
    with pytest.raises(gp.EmitError, match="the output exists") as caught:
        gp.compile(source, RECIPE, output)
    assert caught.value.where == str(plan)


def test_directories_that_can_t_be_exchanged(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", "../here", tmp_path):
        with pytest.raises(gp.EmitError, match=r"working directory|output exists"):
            gp.compile(source, RECIPE, output)
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "there")
    with pytest.raises(gp.EmitError, match="root of a file system"):
        gp.compile(source, RECIPE, tmp_path / "there")
    with (
        pytest.raises(gp.EmitError, match="root of the file system"),
        claimed(Path("/"), overwrite=True),
    ):
        pass


@pytest.mark.parametrize("length", [260, 250, 236])
def test_a_name_that_is_too_long_is_refused_before_any_work(
    source: Path, tmp_path: Path, length: int
) -> None:
    """That of the plan beside it is longer."""
    said: list[str] = []
    output = tmp_path / ("x" * (length - 5) + ".onnx")
    with pytest.raises(gp.EmitError, match="File name too long"):
        gp.compile(source, RECIPE, output, progress=said.append)
    if length > 250:
        with pytest.raises(gp.EmitError, match="File name too long"):
            pack(source, output, progress=said.append)
    assert said == []


def test_a_failure_leaves_no_folders(source: Path, tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError):
        gp.compile(source, {"remove": {"heads": 0.5}}, tmp_path / "a" / "b" / "slim.onnx")
    assert not (tmp_path / "a").exists()
