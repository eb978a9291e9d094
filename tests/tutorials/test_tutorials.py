"""The tutorials run word for word."""

from __future__ import annotations

import os
import shlex

import pytest

from models.cache import model_path
from tutorials.hub import cached, save_tiny
from tutorials.pages import NAMES, blocks, check_shown
from tutorials.reader import follow
from wheel import install, run

MODEL = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("name", ["first-onnx-file", "own-module"])
def test_a_reader_gets_through(name, tmp_path, monkeypatch):
    follow(name, tmp_path, monkeypatch)


def test_a_reader_gets_through_with_a_checkpoint(tmp_path, monkeypatch):
    """Where the hub's cache has a tiny model in place of the real one."""
    from huggingface_hub import constants

    save_tiny(cached(tmp_path / "hf", MODEL))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    follow("first-model", tmp_path / "work", monkeypatch)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return install(tmp_path_factory.mktemp("installed"))


@pytest.mark.slow  # an environment of its own, and the real model: some minutes
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_gets_through_in_an_empty_environment(name, installed, tmp_path):
    """Every command in a process of its own, with the wheel in place of the checkout."""
    if name == "first-model":
        place = cached(tmp_path / "hf", MODEL)
        place.parent.mkdir()
        place.symlink_to(model_path("smollm2"))
    paths = {
        "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "hf"),
        "GRAPHPRUNE_CACHE": str(tmp_path / "cache"),
    }
    work, printed = tmp_path / "work", ""
    work.mkdir()
    for block in blocks(name):
        if block.language == "text":
            check_shown(block.text, printed)
        elif block.file is not None:
            (work / block.file).write_text(block.text)
        elif block.language == "python":
            printed = run(installed / "python", "-c", block.text, cwd=work, **paths)
        else:
            ran = [_program(installed, command) for command in block.commands]
            printed = "".join(run(*words, cwd=work, **paths) for words in ran)


def _program(installed, command):
    program, *arguments = shlex.split(command)
    return installed / program, *arguments
