"""Random graphs under random plans: slim equals masked, or the axis was frozen.

hypothesis draws half of the graphs, and shrinks those that fail; the others come from plain seeds,
which a long run goes on counting: `campaign.py`.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from properties.check import examine
from properties.drawing import draw

# The long run: GRAPHPRUNE_GRAPHS=20000 tools/test --all -k random_graphs
GRAPHS = int(os.environ.get("GRAPHPRUNE_GRAPHS", "500"))
MODULES = 5  # in one of so many graphs `slim.module` is judged too, which takes long
BATCH = 25  # small enough for two workers to share them evenly
SHARDS = [
    pytest.param(i, marks=pytest.mark.slow if i % 2 else ())  # half of them show enough of a change
    for i in range(GRAPHS // 2 // BATCH)
]


@pytest.mark.parametrize("shard", SHARDS)
def test_random_graphs(shard: int) -> None:
    checked = 0
    for number in range(shard * BATCH, (shard + 1) * BATCH):
        recipe = draw(random.Random(number))
        try:
            checked += examine(recipe, number, module=number % MODULES == 0)
        except Exception as error:
            raise AssertionError(f"seed {number}: {recipe}") from error
    assert checked, "no plan was tried"


@pytest.mark.parametrize("shard", SHARDS)
def test_random_graphs_that_shrink(shard: int) -> None:
    @seed(shard)
    @settings(max_examples=BATCH, deadline=None, database=None, print_blob=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.randoms(use_true_random=False), st.integers(0, 2**16))
    def check(rng: random.Random, number: int) -> None:
        recipe = draw(rng)
        try:
            examine(recipe, number)
        except Exception as error:
            raise AssertionError(f"plans of seed {number}: {recipe}") from error

    check()
