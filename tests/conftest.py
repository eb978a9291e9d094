"""What all tests share: what would take most of their time if each did it again."""

from __future__ import annotations

import gc
import logging
import subprocess
from collections.abc import Iterator

import pytest
import torch

import exports
import fresh
from graphprune.measure import measuring
from graphprune.quality import timing

# pytest hands its own handler to every logger that doesn't propagate, and torch writes a trace of
# each export, with all its graphs in words, as soon as this logger has one.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="session", autouse=True)
def _shared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", fresh.instead_of(subprocess.run))
        patch.setattr(torch.export, "export", exports.shared(torch.export.export))
        # Every compilation times its models and lets them complete prompts, and few tests look at
        # how precise the one is, or how long the other.
        patch.setattr(timing, "SECONDS_ENOUGH", 0.0)
        patch.setattr(measuring, "TOKENS", 3)
        yield
    fresh.WAITING.close()


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what stays until the end: libraries, and the tests.

    Traces and exports make millions of objects; it looks for circles among them less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
