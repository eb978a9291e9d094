"""Paths of the real models, for tests that need one."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "models"
UNREACHABLE = 3  # the tool's exit status


def model_path(name: str) -> Path:
    """Return the folder of a model that ``tools/models`` knows, fetching it once if need be.

    The test that asks is skipped, with the reason, where the model cannot be downloaded; anything
    else that goes wrong, such as a wrong hash, fails it.
    """
    done = _fetch(name)
    if done.returncode == UNREACHABLE:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@cache
def _fetch(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--path", name]
    return subprocess.run(command, capture_output=True, text=True, check=False)
