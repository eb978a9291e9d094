"""The program itself: usage, exit codes, what ends it, and how it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import graphprune.pipeline.compiler
from cli.helpers import Result, tree
from graphprune.cli import app as cli

ROOT = Path(__file__).parents[2]


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "graphprune", *arguments]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, **options
    )


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["compile", "--help"]])
def test_help_and_version_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from graphprune.cli.app import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""


def test_version(run: Callable[..., Result]) -> None:
    assert run("--version") == (0, f"graphprune {graphprune.__version__}\n", "")


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
    run: Callable[..., Result], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(graphprune.pipeline.compiler, "compile", broken)
    command = ("compile", str(dense), "-o", str(tmp_path / "y"), "--remove", "ffn=0.5")
    result = run(*command)
    assert result.code == 1
    assert "internal error: ZeroDivisionError: oh" in result.err
    assert "GRAPHPRUNE_DEBUG=1" in result.err
    assert "Traceback" not in result.err
    monkeypatch.setenv("GRAPHPRUNE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(list(command))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_a_signal_that_a_callback_swallows_stops_the_next_stage(
    run: Callable[..., Result],
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    """Python drops what is raised in a finaliser."""
    reached = []

    def deaf(*_: object, progress: Callable[[str], None], **__: object) -> None:
        progress("one")
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            os.kill(os.getpid(), number)
        reached.append("one")
        progress("two")
        reached.append("two")

    monkeypatch.setattr(graphprune.pipeline.compiler, "compile", deaf)
    assert run("compile", dense, "-o", tmp_path / "y", "--remove", "ffn=0.5").code == code
    assert reached == ["one"]


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from graphprune.cli.app import main; main()", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        # The rest of the way is the same, and tests of files stop programs by it.
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
    ids=["int", "term"],
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
