"""Random graphs under random plans: slim equals masked, or the axis was frozen."""

from __future__ import annotations

import os
import random

import pytest

from properties.check import examine
from properties.drawing import draw

# The long run: GRAPHPRUNE_GRAPHS=20000 tools/test -k random_graphs
GRAPHS = int(os.environ.get("GRAPHPRUNE_GRAPHS", "300"))
BATCH = 20


@pytest.mark.parametrize("start", range(0, GRAPHS, BATCH))
def test_random_graphs(start: int) -> None:
    checked = 0
    for seed in range(start, start + BATCH):
        recipe = draw(random.Random(seed))
        try:
            checked += examine(recipe, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {recipe}") from error
    assert checked, "no plan was tried"
