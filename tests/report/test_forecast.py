"""Times and sizes of which only the order of magnitude is known, in words; speed-ups likewise."""

from __future__ import annotations

import pytest

from graphprune.quality.timing import Speedup, in_words
from graphprune.report.forecast import about_size, about_time


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.01, "2 seconds"), (14.2, "14 seconds"), (47, "50 seconds"), (100, "2 minutes"),
     (1130, "19 minutes"), (5400, "2 hours"), (40_000, "11 hours")],
)  # fmt: skip
def test_times(seconds: float, words: str) -> None:
    assert about_time(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [(10, "1 MB"), (723e6, "700 MB"), (1.4e9, "1 GB"), (16.4e9, "16 GB"), (57e9, "60 GB")],
)
def test_sizes(size: float, words: str) -> None:
    assert about_size(size) == words


@pytest.mark.parametrize(
    ("time", "macs", "words"),
    [
        (1.4, 1.43, "1.40x faster with 1.43x fewer MACs"),
        (1 / 1.1, 1.43, "1.10x slower with 1.43x fewer MACs"),
        (1.001, 1.5, "as fast as before with 1.50x fewer MACs"),
        (0.5, 0.8, "2.00x slower with 1.25x more MACs"),
    ],
)
def test_speed_ups(time: float, macs: float, words: str) -> None:
    assert in_words(Speedup(time, macs, time / macs)) == words
