"""The tools that print the tables of docs/."""

import os
from pathlib import Path

import pytest

from fresh import WAITING

ROOT = Path(__file__).parents[2]
RUN = "import os, runpy, sys; os.chdir(sys.argv[1]); sys.path.insert(0, 'tools'); \
sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run(tool, *arguments):
    """Run a tool in a process of its own; what it prints anywhere is in `stderr`."""
    command = ["-c", RUN, ROOT, f"tools/{tool}", *arguments]
    return WAITING.run([*map(str, command)], {**os.environ, "HF_MODULES_CACHE": os.devnull})


@pytest.mark.parametrize(
    ("tool", "document"),
    [
        ("supported_ops", "supported-operators.md"),
        ("layers", "layers.md"),
        ("passes", "passes.md"),
        ("reference", "reference.md"),
        ("pictures", "how-it-works.md"),
    ],
)
def test_documents_are_up_to_date(tool, document):
    done = run(tool, "--check", f"docs/{document}")
    assert done.returncode == 0, done.stderr


def test_every_operator_is_listed_once_with_words():
    from graphprune.ops import torch  # noqa: F401  (it registers the rules)
    from graphprune.ops.registry import OPERATORS

    text = run("supported_ops").stderr
    for name in OPERATORS:
        if name.startswith("aten."):
            assert (
                text.count(f"`{name.removeprefix('aten.')}`, ")
                + text.count(f"`{name.removeprefix('aten.')}` |")
                == 1
            ), name
    assert "See its source" not in text


@pytest.mark.parametrize("tool", ["supported_ops", "zoo", "layers"])
def test_write_then_check(tool, tmp_path):
    file = tmp_path / "table.md"
    assert run(tool, "--check", file).returncode == 1
    assert run(tool, "--write", file).returncode == 0
    assert run(tool, "--check", file).returncode == 0
    assert file.read_text(encoding="utf-8") == run(tool).stderr
    file.write_text("old", encoding="utf-8")
    done = run(tool, "--check", file)
    assert done.returncode == 1
    assert f"run tools/{tool} --write" in done.stderr
