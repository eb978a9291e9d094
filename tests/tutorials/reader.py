"""A reader who does in this process what a tutorial says, word for word."""

from __future__ import annotations

import contextlib
import io
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from graphprune.cli import app
from tutorials.pages import Block, blocks, check_shown


def follow(name: str, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Do all of a page in a folder, and check that what it shows is printed.

    Returns:
        What the last block that was run has printed.
    """
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    before, printed = set(sys.modules), ""
    try:
        for block in blocks(name):
            if block.language == "text":
                check_shown(block.text, printed)
            elif block.file is not None:
                Path(block.file).write_text(block.text)
            else:
                printed = _run(block)
    finally:
        for module in set(sys.modules) - before:
            own = getattr(sys.modules[module], "__file__", None)
            if own and Path(own).is_relative_to(folder):
                del sys.modules[module]
    return printed


def _run(block: Block) -> str:
    """Run commands, or a script; return what they print, progress left out."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if block.language == "python":
            exec(compile(block.text, "tutorial", "exec"), {"__name__": "__main__"})
        for command in block.commands if block.language == "bash" else ():
            program, *arguments = shlex.split(command)
            if program == "python":
                _script(arguments)
            else:
                assert program == "graphprune", command
                _graphprune(arguments)
    return out.getvalue()


def _script(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def _graphprune(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(arguments)
    assert not ended.value.code, arguments
