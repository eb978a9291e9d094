"""The examples of docs/integrations.md run as they stand."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def needed(block):
    wanted = [name for name in ("olive", "transformers.exporters") if name in block]
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def test_there_is_one_of_each():
    modules = {
        name for block in BLOCKS for name in re.findall(r"integrations\.(\w+) import", block)
    }
    assert modules == {"exported_program", "onnx_ir", "transformers", "olive"}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example(block, tmp_path, monkeypatch):
    if absent := needed(block):
        pytest.skip(f"{', '.join(absent)} isn't installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "OLIVE_DISABLE_TELEMETRY", "1")
    exec(compile(block, str(PAGE), "exec"), {"__name__": "example"})
