"""What all tests share: processes that open checkpoints don't wait for transformers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

import fresh


@pytest.fixture(scope="session", autouse=True)
def _fresh_processes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", fresh.instead_of(subprocess.run))
        yield
    fresh.WAITING.close()
